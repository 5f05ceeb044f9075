"""Writes in place that need no conversion of a whole graph, which takes PyTorch seconds: ``x *= y``, where x is a sum
or a product with which nothing else shares memory. Lowering takes the result for x from there on.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

_ARITHMETIC = ("add", "sub", "mul", "div")
_FUNCTIONAL = {
    getattr(getattr(torch.ops.aten, f"{name}_"), kind): getattr(getattr(torch.ops.aten, name), kind)
    for name in _ARITHMETIC
    for kind in ("Tensor", "Scalar")
}
_FRESH = frozenset({*_FUNCTIONAL.values(), torch.ops.aten.linear.default, torch.ops.aten.matmul.default})
"""Ops whose results are memory of their own."""


def is_write(node: fx.Node) -> bool:
    """True for an op that writes in place; ``detach_`` moves no data."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target._schema.is_mutable
        and target._schema.name != "aten::detach_"
    )


def overwritten(node: fx.Node) -> fx.Node | None:
    """The value that a write changes, where it may be lowered as an op that gives a new one; else None."""
    if node.target not in _FUNCTIONAL:
        return None
    x, y = node.args[:2]
    if not isinstance(x, fx.Node) or x.target not in _FRESH:
        return None
    if any(user.target not in _FRESH for user in x.users if user < node):
        return None  # it may be a view of x, which sees the write, or another write
    mine, other = x.meta.get("val"), y.meta.get("val") if isinstance(y, fx.Node) else y
    if not isinstance(mine, Tensor) or not isinstance(other, Tensor | int | float):
        return None
    return x if torch.result_type(mine, other) == mine.dtype else None


def functional(node: fx.Node) -> torch._ops.OpOverload:
    """The op that gives what a write leaves behind."""
    return _FUNCTIONAL[node.target]
