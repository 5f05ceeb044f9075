"""Rules for what AOT autograd's functional graphs say instead of composites and of writes in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from tilewright.ir.types import Value

from .aten_rules import Context, Number, Result, axis, rule
from .aten_rules_reduce import normalize
from .aten_rules_view import from_front


@rule("prims.convert_element_type.default")
def _convert(ctx: Context, x: Value, dtype: Any) -> Result:
    return ctx.cast(x, ctx.out.dtype)


@rule("copy.default")
def _copied(ctx: Context, x: Value, source: Value, non_blocking: bool = False) -> Result:
    return ctx.expand(ctx.cast(source, ctx.out.dtype), ctx.out.shape)


@rule("native_layer_norm.default")
def _native_layer_norm(
    ctx: Context,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None,
    bias: Value | None,
    eps: float,
) -> Result:
    rank = x.type.rank
    out, mean, scale = normalize(ctx, x, range(rank - len(normalized_shape), rank), weight, bias, eps)
    return out, ctx.cast(mean, ctx.outs[1].dtype), ctx.cast(scale, ctx.outs[2].dtype)


@rule("select_scatter.default")
def _select_scatter(ctx: Context, x: Value, source: Value, dim: int, index: Number) -> Result:
    at = axis(dim, x.type.rank)
    return _replaced(ctx, x, ctx.unsqueeze(source, at), at, from_front(index, x.shape[at]))


@rule("slice_scatter.default")
def _slice_scatter(
    ctx: Context,
    x: Value,
    source: Value,
    dim: int = 0,
    start: Number | None = None,
    end: Number | None = None,
    step: int = 1,
) -> Result:
    at = axis(dim, x.type.rank)
    first = from_front(0 if start is None else start, x.shape[at])
    if step > 1 and source.shape[at] != 1:
        return _every(ctx, x, source, at, first, step)
    return _replaced(ctx, x, source, at, first)


def _every(ctx: Context, x: Value, part: Value, at: int, first: Number | None, step: int) -> Result:
    """``x`` with ``part`` in place of every ``step``-th of what it has along dim ``at`` from ``first`` on; None where
    sizes are not known.

    The last one aside, each is followed by ``step - 1`` others: rows of which it is the first.
    """
    rows = part.shape[at] - 1
    if first is None or not rows.is_Integer:
        return None
    start = sympy.sympify(first)
    block = ctx.narrow(x, at, start, rows * step)
    shape = block.shape
    others = ctx.narrow(
        ctx.reshape(block, (*shape[:at], rows, sympy.Integer(step), *shape[at + 1 :])),
        at + 1,
        1,
        sympy.Integer(step - 1),
    )
    heads = ctx.cast(ctx.unsqueeze(ctx.narrow(part, at, 0, rows), at + 1), x.dtype)
    joined = ctx.reshape(ctx.builder.add("concat", heads, others, axis=at + 1), shape)
    replaced = _replaced(ctx, x, joined, at, start)
    if not isinstance(replaced, Value):
        return None
    return _replaced(ctx, replaced, ctx.narrow(part, at, rows, sympy.Integer(1)), at, start + rows * step)


def _replaced(ctx: Context, x: Value, part: Value, at: int, first: Number | None) -> Result:
    """``x`` with ``part`` in place of what it has along dim ``at`` from ``first`` on; None where that is not known."""
    if first is None:
        return None
    start, size = sympy.sympify(first), x.shape[at]
    end = start + part.shape[at]
    rest = sympy.expand(size - end)
    if not rest.is_nonnegative:
        return None
    pieces = [
        ctx.narrow(x, at, 0, start) if start != 0 else None,
        ctx.cast(part, x.dtype),
        ctx.narrow(x, at, end, rest) if rest != 0 else None,
    ]
    kept = [piece for piece in pieces if piece is not None]
    return kept[0] if len(kept) == 1 else ctx.builder.add("concat", *kept, axis=at)
