"""Scores predictions of a text against those of a reference model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.distances import kl_divergence, surprise
from benchmarks.predictors import Predictor
from benchmarks.quality_results import Closeness
from tilewright.progress import Advance


def closeness(
    reference: Predictor, others: Sequence[Predictor], windows: Tensor, side_by_side: int, advance: Advance
) -> tuple[Closeness, ...]:
    """The reference and then the others on the same windows i64[N, T], ``side_by_side`` at a time.

    All systems see a group before the next one comes, so that the reference's distributions of one group are all that
    is held: f32[side_by_side, T - 1, V]. The last token of a window is only a target.
    """
    systems = [reference, *others]
    parts: list[list[Tensor]] = [[] for _ in systems]
    for start in range(0, len(windows), side_by_side):
        group = windows[start : start + side_by_side]
        advance(f"{reference.name}, windows from {start}")
        expected = _log_probs(reference, group[:, :-1])
        for n, system in enumerate(systems):
            if n:
                advance(f"{system.name} {system.precision}, windows from {start}")
            pieces = system.logits(group[:, :-1]) if n else iter([(slice(None), slice(None), expected)])
            parts[n].append(_scores(pieces, expected, group[:, 1:]))
    scores = [torch.cat(part, dim=1) for part in parts]  # each [3, N]
    return tuple(
        Closeness(s.name, s.precision, *(tuple(row.tolist()) for row in found))
        for s, found in zip(systems, scores, strict=True)
    )


def _log_probs(system: Predictor, ids: Tensor) -> Tensor:
    """Log-probabilities f32[B, T, V] of the next token, for ids i64[B, T]."""
    found: Tensor | None = None
    for rows, positions, logits in system.logits(ids):
        if found is None:
            found = torch.empty(*ids.shape, logits.shape[-1])
        found[rows, positions] = logits.float().log_softmax(-1)
    assert found is not None
    return found


def _scores(pieces: Iterator[tuple[slice, slice, Tensor]], expected: Tensor, targets: Tensor) -> Tensor:
    """Means over the positions of each row, f64[3, B]: surprise, KL divergence, agreement."""
    scores = torch.zeros(3, *targets.shape, dtype=torch.float64)
    for rows, positions, logits in pieces:
        wanted = expected[rows, positions]
        found = logits.float().log_softmax(-1)
        scores[0, rows, positions] = surprise(found, targets[rows, positions]).double()
        scores[1, rows, positions] = kl_divergence(wanted, found).double()
        scores[2, rows, positions] = (wanted.argmax(-1) == found.argmax(-1)).double()
    return scores.mean(-1)
