"""The numerics rule: a result is right when it is about as close to a float64 run as eager PyTorch in its dtype is."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 1.5


def assert_no_further(ours: Tensor, eager: Tensor, exact: Tensor, what: str = "") -> None:
    """``ours`` is no further from ``exact`` (float64) than 1.5 times what ``eager`` is, plus rounding of the result.

    Root-mean-square and largest error are held to the rule separately.
    """
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    rounding = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    mine, theirs = (ours.double() - exact).abs(), (eager.double() - exact).abs()
    for name, error, allowed in (
        ("rms", mine.square().mean().sqrt().item(), theirs.square().mean().sqrt().item()),
        ("largest", mine.max().item(), theirs.max().item()),
    ):
        assert error <= FACTOR * allowed + rounding, (
            f"{what}: {name} error {error:.3g}, eager's is {allowed:.3g}"
        )
