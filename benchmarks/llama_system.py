"""llama.cpp as a system of the benchmark."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from benchmarks.llama_context import LlamaContext, require_survivor
from benchmarks.results import DECODE, FIRST_TOKEN, LLAMA_CPP, PREFILL

KV_ITEMSIZE = 2
"""Bytes of a number in llama.cpp's KV state, which is f16 whatever the weights are."""


class LlamaCpp:
    """A system (``system.py``): greedy tokens through ``llama_decode``, with the least Python that can drive it.

    kv_bytes: bytes of keys and values of one position.
    """

    name = LLAMA_CPP
    batch = 1
    tasks = frozenset({DECODE, PREFILL, FIRST_TOKEN})

    def __init__(self, file: Path, threads: int, room: int, kv_bytes: int) -> None:
        require_survivor(file, threads)
        self._context = LlamaContext(file, threads, room)
        self._kv_bytes = kv_bytes
        self._held: list[int] = []

    def prefill(self, ids: Tensor) -> float:
        """Seconds to run a prompt i64[1, S] from an empty cache to the logits of its last token."""
        tokens = ids[0].tolist()
        self._forget(0)
        start = time.perf_counter()
        self._context.evaluate(tokens)
        return time.perf_counter() - start

    def first_token(self, ids: Tensor) -> float:
        """Seconds until the greedy token after a prompt i64[1, S] is chosen."""
        tokens = ids[0].tolist()
        self._forget(0)
        start = time.perf_counter()
        self._context.evaluate(tokens).argmax()
        return time.perf_counter() - start

    def decode(self, ids: Tensor, tokens: int) -> float:
        """Seconds for ``tokens`` greedy tokens after the first one, with i64[1, S] as context."""
        *before, last = ids[0].tolist()
        if self._held != before:
            self._forget(0)
            self._context.evaluate(before)
            self._held = before
        self._context.forget(len(before))
        token = int(self._context.evaluate([last]).argmax())
        start = time.perf_counter()
        for _ in range(tokens):
            token = int(self._context.evaluate([token]).argmax())
        return time.perf_counter() - start

    def bytes_per_step(self, context: int) -> int:
        """The tensors of the file once, and keys and values of ``context`` positions."""
        return self._context.weight_bytes + context * self._kv_bytes

    def release(self) -> None:
        """Forget the context. llama.cpp keeps its memory, of a fixed size."""
        self._forget(0)

    def close(self) -> None:
        """Free what llama.cpp holds."""
        self._context.close()

    def _forget(self, length: int) -> None:
        self._context.forget(length)
        self._held = []
