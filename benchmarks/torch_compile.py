"""``torch.compile`` with a static KV cache, in the form that its documentation recommends for decoding."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks import models
from benchmarks.results import DECODE, PREFILL, TORCH_COMPILE
from tilewright.cache import with_cache
from tilewright.trials import wait


class TorchCompile:
    """A system (``system.py``): a Hugging Face model whose forward is compiled for each shape, called in a bare loop.

    A static cache has room for exactly the context and the tokens to come, since every step reads all of it.
    Time to first token is no task of it: ``generate`` runs prompts uncompiled, so that would be eager's figure.
    """

    name = TORCH_COMPILE
    tasks = frozenset({DECODE, PREFILL})

    def __init__(self, model: Any, batch: int = 1) -> None:
        self.model = model
        self.batch = batch
        # One graph per shape: nothing is slower for being dynamic. Modes that use CUDA graphs change nothing on a CPU.
        mode = "max-autotune" if model.device.type == "cuda" else None
        self._forward = torch.compile(model.forward, dynamic=False, mode=mode)
        self._caches: dict[tuple[int, int], StaticCache] = {}

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> float:
        """Seconds to run a prompt i64[1, S] from an empty cache to the logits of its last token."""
        ids = ids.repeat(self.batch, 1)
        cache = self._cache(ids, ids.shape[1])
        _set_length(cache, 0)
        given = with_cache(self.model.forward, cache)
        wait(ids.device)
        start = time.perf_counter()
        self._forward(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
        wait(ids.device)
        return time.perf_counter() - start

    def first_token(self, ids: Tensor) -> float:
        raise NotImplementedError("no task of torch.compile")

    @torch.no_grad()
    def decode(self, ids: Tensor, tokens: int) -> float:
        """Seconds for ``tokens`` greedy steps after the first, with i64[1, S] as context."""
        ids = ids.repeat(self.batch, 1)
        context = ids.shape[1]
        cache = self._cache(ids, context + tokens)
        _set_length(cache, context - 1)
        given = with_cache(self.model.forward, cache) | self._positions(ids, context + tokens)
        token = self._step(ids[:, -1:], given)
        wait(ids.device)
        start = time.perf_counter()
        for _ in range(tokens):
            token = self._step(token, given)
        wait(ids.device)
        return time.perf_counter() - start

    def bytes_per_step(self, context: int) -> int:
        """Those of the model; that a static cache is read to its end is not asked for."""
        return models.bytes_per_step(self.model, context, self.batch)

    def release(self) -> None:
        """Forget the caches; compiled code stays, and serves caches of the same size."""
        self._caches.clear()

    def close(self) -> None:
        """Give compiled code back, which dynamo else keeps for the life of the process."""
        self._caches.clear()
        torch._dynamo.reset()

    def _step(self, token: Tensor, given: dict[str, Any]) -> Tensor:
        """The greedy token i64[B, 1] after ``token``; moves the position in ``given`` on."""
        output = self._forward(input_ids=token, use_cache=True, logits_to_keep=1, **given)
        if "position_ids" in given:
            given["position_ids"] += 1
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def _positions(self, ids: Tensor, room: int) -> dict[str, Tensor]:
        """What a step of a model with a table of positions is told of them: where it stands, and a mask of ones.

        Without that such a model counts them on the host, from the cache's length, and is compiled anew at each one.
        Models without a table find them on the device, and need not read a mask.
        """
        tables = [m for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        if len(tables) < 2:
            return {}
        mask = torch.ones(len(ids), room, dtype=torch.int64, device=ids.device)
        return {"attention_mask": mask, "position_ids": torch.full_like(ids[:, -1:], ids.shape[1] - 1)}

    def _cache(self, ids: Tensor, room: int) -> StaticCache:
        """A cache with ``room`` positions that holds all of the prompt but its last token, which is run uncompiled."""
        key = (ids.shape[1], room)
        if key not in self._caches:
            cache = StaticCache(config=self.model.config, max_cache_len=room)
            past = with_cache(self.model.forward, cache)
            self.model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1, **past)
            self._caches[key] = cache
        return self._caches[key]


def _set_length(cache: StaticCache, length: int) -> None:
    """Forget what a cache holds from ``length`` on; the mask then hides it."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)
