"""One side of the comparison. A compiled model has the interface of its original, so both sides run the same code."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from tilewright.timing import TimedStreamer


class Subject:
    """Times a causal language model, compiled or not, on batches of one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._caches: dict[int, Any] = {}

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> float:
        """Seconds to run a prompt i64[1, S] from an empty cache to the logits of its last token."""
        start = time.perf_counter()
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    def first_token(self, ids: Tensor) -> float:
        """Seconds until ``generate`` has the first token after a prompt i64[1, S]."""
        streamer = TimedStreamer()
        start = time.perf_counter()
        self._generate(ids, 1, streamer)
        return streamer.timing(start).first

    def decode(self, ids: Tensor, tokens: int) -> float:
        """Seconds that ``generate`` takes for ``tokens`` tokens after the first one, with i64[1, S] as context.

        The context is in the cache already, and the cache is cut back afterwards, so that every sample starts alike.
        """
        context = ids.shape[1]
        cache = self._context(ids)
        streamer = TimedStreamer()
        start = time.perf_counter()
        self._generate(ids, tokens + 1, streamer, past_key_values=cache)
        cache.crop(context - 1 - cache.get_seq_length())  # a negative count is removed from the end
        return streamer.timing(start).rest

    def _generate(self, ids: Tensor, tokens: int, streamer: TimedStreamer, **options: Any) -> None:
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
            self._caches[length] = output.past_key_values
        return self._caches[length]
