"""A causal model with the interface of Hugging Face. A compiled model has it too, so both run the same code here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import BATCHED, DECODE, FIRST_TOKEN, PREFILL
from tilewright.cache import cache_of, with_cache
from tilewright.timing import TimedStreamer
from tilewright.trials import wait


class Subject:
    """A system (``system.py``) that is asked through ``forward`` and ``generate``.

    bytes_per_step: the bytes of a decode step at a context, of the whole batch.
    """

    tasks = frozenset({DECODE, PREFILL, FIRST_TOKEN, BATCHED})

    def __init__(
        self, name: str, model: Any, bytes_per_step: Callable[[int], int] = lambda _: 0, batch: int = 1
    ) -> None:
        self.name = name
        self.model = model
        self.batch = batch
        self._bytes_per_step = bytes_per_step
        self._caches: dict[int, Any] = {}

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> float:
        """Seconds to run a prompt i64[1, S] from an empty cache to the logits of its last token."""
        ids = self._rows(ids)
        wait(ids.device)
        start = time.perf_counter()
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        wait(ids.device)
        return time.perf_counter() - start

    def first_token(self, ids: Tensor) -> float:
        """Seconds until ``generate`` has the first token after a prompt i64[1, S]."""
        ids = self._rows(ids)
        streamer = TimedStreamer()
        start = time.perf_counter()
        self._generate(ids, 1, streamer)
        return streamer.timing(start).first

    def decode(self, ids: Tensor, tokens: int) -> float:
        """Seconds that ``generate`` takes for ``tokens`` tokens after the first one, with i64[1, S] as context.

        The context is in the cache already, and the cache is cut back afterwards, so that every sample starts alike.
        On a GPU a streamer would have the host wait for every token, which callers without one do not: there it is the
        time of the whole call for one token more, of which each takes as long.
        """
        ids = self._rows(ids)
        context = ids.shape[1]
        cache = self._context(ids)
        alone = ids.device.type == "cuda"
        streamer = None if alone else TimedStreamer()
        past = with_cache(self.model.forward, cache)
        wait(ids.device)
        start = time.perf_counter()
        self._generate(ids, tokens + 1, streamer, **past)
        wait(ids.device)
        seconds = time.perf_counter() - start
        cache.crop(context - 1 - cache.get_seq_length())  # a negative count is removed from the end
        return seconds * tokens / (tokens + 1) if streamer is None else streamer.timing(start).rest

    def bytes_per_step(self, context: int) -> int:
        """As the caller of ``__init__`` counted them."""
        return self._bytes_per_step(context)

    def release(self) -> None:
        """Forget the cached contexts, and memory that a compiled model keeps for later ones."""
        self._caches.clear()
        ours = getattr(self.model, "_tilewright", None)
        if ours is not None:
            ours.engine.idle.make_room()

    def close(self) -> None:
        """Forget the cached contexts."""
        self.release()

    def _rows(self, ids: Tensor) -> Tensor:
        return ids.repeat(self.batch, 1)

    def _generate(self, ids: Tensor, tokens: int, streamer: TimedStreamer | None, **options: Any) -> None:
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            streamer=streamer,
            **options,
        )

    @torch.no_grad()
    def _context(self, ids: Tensor) -> Any:
        """A cache that holds all of the prompt but its last token."""
        length = ids.shape[1]
        if length not in self._caches:
            output = self.model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1)
            self._caches[length] = cache_of(output)
        return self._caches[length]
