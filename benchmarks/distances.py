"""How far a model is from another: of distributions over tokens, and of rankings."""

from __future__ import annotations

import torch
from torch import Tensor


def surprise(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, [...], of ``targets`` i64[...] under ``log_probs`` [..., V]."""
    return -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference ‖ other) in nats, [...], of log-probabilities [..., V].

    The terms are p (log p/q - 1 + q/p), whose additions cancel in the sum: none is negative then, and where the two
    hardly differ, rounding does not drown what is left.
    """
    difference = reference - other
    return (reference.exp() * (torch.expm1(-difference) + difference)).sum(-1)


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two lists [n]: the correlation of their ranks, equal values sharing the mean of theirs."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))


def ranks(values: Tensor) -> Tensor:
    """Rank of each value, f64[n], from 1 for the smallest."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]
