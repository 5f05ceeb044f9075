"""The greedy choice of a token by kernels of our own instead of PyTorch's operations; see ``codegen.triton.greedy``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .kernels import Kernels


@dataclass(frozen=True)
class Kept:
    """What a choice reads and writes, all of it staying where it is.

    logits [batch, V]; eos i64[E], ends of sequences; open bool[batch, 1], rows that have not met theirs; ids
    i64[batch, 1], the choice; sequences i64[batch, max_length]; column i64[1], where the next token goes in them; least
    i64[1], the column below which no end is chosen. pad: what rows get that are at their end.
    """

    logits: Tensor
    eos: Tensor
    open: Tensor
    ids: Tensor
    sequences: Tensor
    column: Tensor
    least: Tensor
    pad: int


class GreedyKernels:
    """The kernels of the module at ``path``. parts: what they cut a vocabulary into. Raises KernelBuildError when it
    cannot be loaded."""

    def __init__(self, path: Path, parts: int) -> None:
        self.parts = parts
        self._kernels = Kernels(path)

    @property
    def functions(self) -> Mapping[str, Any]:
        """The kernels by name, as functions under ``triton.jit``."""
        return self._kernels.functions

    @property
    def compiled(self) -> int:
        """How many kernels were compiled, or found compiled on disk, so far."""
        return self._kernels.compiled

    @torch.inference_mode(False)
    def launch_once(self, logits: Tensor, buckets: Sequence[int]) -> None:
        """Launch every kernel, so that no request has to wait for its loading."""

        def zero() -> Tensor:  # each an allocation of its own, aligned as those of requests are
            return torch.zeros(1, 1, dtype=torch.int64, device=logits.device)

        for rows in buckets:
            column, least, is_open = zero()[0], zero()[0], torch.ones_like(logits[:, :1], dtype=torch.bool)
            self.bind(Kept(logits, least[:0], is_open, zero(), zero(), column, least, 0), rows)()

    def bind(self, kept: Kept, rows: int) -> Callable[[], None]:
        """A function that chooses: launches in a bucket of ``rows``, with nothing of the host."""
        batch = len(kept.logits)
        scores = torch.empty(batch, self.parts, device=kept.ids.device)
        places = torch.empty_like(scores, dtype=torch.int32)
        dims = {"B": batch, "E": len(kept.eos), "M": kept.sequences.shape[1], "P": kept.pad}
        best = partial(
            self._kernels.launch,
            "best",
            [kept.logits, kept.eos, kept.column, kept.least, scores, places],
            dims,
        )
        is_open = kept.open.view(torch.uint8)
        keep = partial(
            self._kernels.launch, f"keep_b{rows}",
            [scores, places, kept.eos, is_open, kept.ids, kept.sequences, kept.column], dims,
        )  # fmt: skip

        def choose() -> None:
            # Triton launches on the current device, whichever its arguments are on.
            with torch.cuda.device(scores.device) if scores.is_cuda else nullcontext():
                best()
                keep()

        return choose
