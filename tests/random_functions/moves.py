"""The moves that a random function is drawn from, and how often each comes up."""

from __future__ import annotations

from .draft import Move
from .idioms import attention, gated, norm, rotary, row_scale, softmax, spelled_attention, torch
from .movement import concat, gather, view
from .pointwise import binary, cast, compare, integer, select, unary
from .products import batched_matmul, linear, reduce
from .recurrent import recurrent

_ALWAYS: dict[Move, int] = {
    unary: 3, binary: 4, reduce: 2, view: 4, concat: 2, gather: 1, linear: 3, batched_matmul: 1, softmax: 1, norm: 1,
    rotary: 1, gated: 1, integer: 1, compare: 1, select: 1, cast: 1, row_scale: 1,
}  # fmt: skip


def moves(has_attention: bool, is_stateful: bool, torch_calls: bool) -> dict[Move, int]:
    """Each move with its weight; attention, what remembers and PyTorch's own ops only where a test can take them."""
    chosen = dict(_ALWAYS)
    if has_attention:
        chosen |= {attention: 2, spelled_attention: 1}
    if is_stateful:
        chosen[recurrent] = 1
    return chosen | ({torch: 1} if torch_calls else {})
