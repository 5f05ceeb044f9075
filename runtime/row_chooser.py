"""Choosing tokens for rows of logits that belong to different requests, each with options of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .host import one_torch_thread, quick
from .sampling import CustomOptions, GenerateOptions, sample, sample_on_device


@dataclass(frozen=True)
class Choice:
    """How a row's token is chosen. early: no token may end the sequence yet. generator: what draws, if any does. ids:
    the tokens i64[1, n] so far, for options that ask for them."""

    options: GenerateOptions
    early: bool = False
    generator: torch.Generator | None = None
    ids: Tensor | None = None

    @property
    def is_best(self) -> bool:
        """True where the token is just that of the highest score."""
        return self.options.sampling is None and not isinstance(self.options, CustomOptions)


class RowChooser:
    """Chooses by ``logits`` [B, 1, V], whose memory is written anew for each step."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        rows = logits[:, 0]
        self._scores = rows if rows.dtype == torch.float32 else torch.empty_like(rows, dtype=torch.float32)
        self._widen = widener(rows, self._scores)
        self._quick = quick(self._scores)

    def choose(self, choices: Sequence[Choice]) -> list[int | Exception]:
        """A token for each of the first rows, or why there is none: scores that are no numbers give nothing to draw."""
        self._widen()
        for row, choice in enumerate(choices):
            if choice.early and choice.options.eos_ids:
                self._quick[row, list(choice.options.eos_ids)] = -torch.inf
        best = self._best(len(choices))
        failed: dict[int, Exception] = {}
        others = [row for row, choice in enumerate(choices) if not choice.is_best]
        with one_torch_thread(self._scores.device) if others else nullcontext():
            for row in others:
                try:
                    best[row] = self._token(row, choices[row])
                except Exception as error:  # noqa: BLE001 - options may hold code of anybody's
                    failed[row] = error
        return [failed.get(row, token) for row, token in enumerate(best.tolist())]

    def _token(self, row: int, choice: Choice) -> Any:
        """A token by the scores of a row; on a GPU it stays there."""
        scores, options = self._scores[row : row + 1], choice.options
        if isinstance(options, CustomOptions):
            assert choice.ids is not None
            scores = options.process(choice.ids, scores.clone())
        if options.sampling is None:
            token = scores.argmax(dim=-1)
        elif scores.device.type == "cpu":
            token = sample(scores, options.sampling, choice.generator)
        else:
            token = sample_on_device(scores, options.sampling, choice.generator)
        return int(token) if scores.device.type == "cpu" else token.view(())

    def _best(self, rows: int) -> np.ndarray | Tensor:
        """The first of the best tokens of each row."""
        if self._scores.device.type == "cpu":
            return np.argmax(self._quick[:rows], axis=-1)
        return torch.argmax(self._scores[:rows], dim=-1)


def widener(logits: Tensor, exact: Tensor) -> Callable[[], object]:
    """A function that copies logits into float32 of the same shape, where they are not those."""
    if exact is logits:
        return lambda: None
    if logits.device.type != "cpu":
        return partial(exact.copy_, logits)
    if logits.dtype == torch.bfloat16:
        # NumPy has no bfloat16, but that is the upper half of a float32.
        bits, wide = logits.view(torch.uint16).numpy(), exact.view(torch.uint32).numpy()
        return partial(np.left_shift, bits, 16, out=wide, dtype=np.uint32)
    return partial(exact.numpy().__setitem__, slice(None), logits.numpy())
