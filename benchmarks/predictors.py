"""Systems whose predictions are compared: each gives the logits of windows of text, in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.llama_context import LlamaContext, require_survivor
from benchmarks.results import LLAMA_CPP
from tilewright.cache import cache_of, with_cache

Piece = tuple[slice, slice, Tensor]
"""Rows and positions of a window, and their logits [rows, positions, V]."""


class Through(StrEnum):
    """How the text is fed: one token at a time through the decode program, or all of it as a prompt.

    Weights in int8 and int4 come with quantised activations in some programs and not in others, so it matters which.
    """

    decode = "decode"
    prefill = "prefill"


class Predictor(Protocol):
    """A system at a precision. ``logits`` takes token ids i64[B, T]; together its pieces cover B rows and T positions,
    each piece once."""

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> str: ...

    def logits(self, ids: Tensor) -> Iterator[Piece]: ...

    def close(self) -> None: ...


class ModelPredictor:
    """A model with the interface of Hugging Face; decoding runs the rows side by side."""

    def __init__(self, name: str, precision: str, model: Any, through: Through) -> None:
        self.name = name
        self.precision = precision
        self._model = model
        self._through = through

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Iterator[Piece]:
        if self._through is Through.prefill:
            for n in range(ids.shape[0]):
                yield slice(n, n + 1), slice(None), self._model(input_ids=ids[n : n + 1]).logits
            return
        cache = None
        for t in range(ids.shape[1]):
            past = with_cache(self._model.forward, cache)
            output = self._model(input_ids=ids[:, t : t + 1], use_cache=True, **past)
            cache = cache_of(output)
            yield slice(None), slice(t, t + 1), output.logits

    def close(self) -> None:
        """Nothing that garbage collection would not free."""


class LlamaPredictor:
    """llama.cpp on a GGUF file; one row after the other."""

    name = LLAMA_CPP

    def __init__(self, precision: str, file: Path, threads: int, length: int, through: Through) -> None:
        self.precision = precision
        require_survivor(file, threads)
        self._context = LlamaContext(file, threads, length)
        self._through = through

    def logits(self, ids: Tensor) -> Iterator[Piece]:
        for n, tokens in enumerate(ids.tolist()):
            self._context.forget(0)
            row = slice(n, n + 1)
            if self._through is Through.prefill:
                yield row, slice(None), torch.from_numpy(self._context.evaluate_all(tokens)).unsqueeze(0)
                continue
            for t, token in enumerate(tokens):
                logits = torch.from_numpy(self._context.evaluate([token]))
                yield row, slice(t, t + 1), logits.reshape(1, 1, -1)

    def close(self) -> None:
        """Free what llama.cpp holds."""
        self._context.close()
