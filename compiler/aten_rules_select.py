"""Rules that choose among the elements of a row: the largest ones, those that an index names, and writes to those."""

from __future__ import annotations

from sympy import Expr, Integer, prod

from tilewright.ir.index import index_symbols, linear_index, reshape_map
from tilewright.ir.types import DType, TensorType, Value

from .aten_rules import Context, Result, Rule, axis, rule

_COMPARED = 512
"""The longest row that is ranked by comparing all pairs: as many experts as models have. PyTorch takes longer ones."""


def _as_column(ctx: Context, x: Value, size: Expr) -> Value:
    """[.., n] -> [.., n, size]: each element ``size`` times."""
    return ctx.expand(ctx.unsqueeze(x, x.type.rank), (*x.shape, size))


def _as_row(ctx: Context, x: Value, size: Expr) -> Value:
    """[.., n] -> [.., size, n]: each row ``size`` times."""
    at = x.type.rank - 1
    return ctx.expand(ctx.unsqueeze(x, at), (*x.shape[:-1], size, x.shape[-1]))


@rule("topk.default")
def _topk(ctx: Context, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Result:
    """An element's rank is how many come before it: larger ones, and equal ones on its left. Result p has rank p.

    Places are found by a maximum and not by a sum, so that they stay inside the row where it holds NaN. Routers rank
    floats; integers have no minus infinity to fill the other places with.
    """
    last = x.type.rank - 1
    if last < 0 or axis(dim, x.type.rank) != last or not largest or not isinstance(k, int) or k < 1:
        return None
    if not x.dtype.is_float:
        return None
    size = x.shape[last]
    if not size.is_Integer or size > _COMPARED:
        return None
    square = (*x.shape, size)
    mine, other = _as_column(ctx, x, size), _as_row(ctx, x, size)
    here, there = ctx.positions(size, square, last), ctx.positions(size, square, last + 1)
    left = ctx.apply("lt", there, here)
    before = ctx.apply("where", left, ctx.apply("ge", other, mine), ctx.apply("gt", other, mine))
    rank = ctx.reduce("sum", ctx.cast(before, DType.i64), [last + 1], False)
    shape = (*x.shape[:-1], Integer(k), size)
    place = ctx.positions(Integer(k), shape, last)
    found = ctx.apply("eq", _as_row(ctx, rank, Integer(k)), place)
    values = ctx.apply("where", found, _as_row(ctx, x, Integer(k)), ctx.const(float("-inf"), x.dtype))
    indices = ctx.apply("where", found, ctx.positions(size, shape, last + 1), ctx.const(0, DType.i64))
    return tuple(ctx.reduce("max", v, [last + 1], False) for v in (values, indices))


@rule("argmax.default")
def _argmax(ctx: Context, x: Value, dim: int | None = None, keepdim: bool = False) -> Result:
    """The first place of the largest element; as for PyTorch, NaN is larger than any number."""
    if dim is None or x.type.rank == 0:
        return None
    return _first(ctx, "max", x, axis(dim, x.type.rank), keepdim)


def _first(ctx: Context, kind: str, x: Value, at: int, keepdim: bool) -> Value:
    best = ctx.expand(ctx.reduce(kind, x, [at], True), x.shape)
    found = ctx.apply("eq", x, best)
    if x.dtype.is_float:
        found = ctx.apply("or", found, ctx.apply("ne", x, x))
    places = ctx.positions(x.shape[at], x.shape, at)
    last = ctx.const(x.shape[at] - 1, DType.i64)
    return ctx.reduce("min", ctx.apply("where", found, places, last), [at], keepdim)


def _best(kind: str) -> Rule:
    def lower(ctx: Context, x: Value, dim: int, keepdim: bool = False) -> Result:
        """The largest (or smallest) element of each row, and its first place; NaN comes before any number."""
        if x.type.rank == 0 or x.dtype is DType.bool:
            return None
        at = axis(dim, x.type.rank)
        return ctx.reduce(kind, x, [at], keepdim), _first(ctx, kind, x, at, keepdim)

    return lower


for _kind in ("max", "min"):
    rule(f"{_kind}.dim")(_best(_kind))


@rule("gather.default")
def _gather(ctx: Context, x: Value, dim: int, index: Value, sparse_grad: bool = False) -> Result:
    """A lookup in x as one long row, in which elements along ``dim`` lie next to each other."""
    if x.type.rank == 0:
        return None
    at = axis(dim, x.type.rank)
    others = [n for n in range(x.type.rank) if n != at]
    sizes, symbols = [x.shape[n] for n in others], index_symbols(x.type.rank)
    rows = prod(sizes, start=Integer(1))
    row = ctx.builder.add("iota", type=TensorType(DType.i64, (rows,)))
    row = ctx.view(row, index.shape, [linear_index([symbols[n] for n in others], sizes)])
    place = ctx.apply("add", ctx.apply("mul", row, x.shape[at]), ctx.cast(index, DType.i64))
    x = ctx.permute(x, [*others, at])
    long_row = (rows * x.shape[-1],)
    flat = ctx.view(x, long_row, reshape_map(x.shape, long_row).exprs)
    return ctx.builder.add("gather", flat, place, axis=0)


@rule("scatter.value")
def _scatter(ctx: Context, x: Value, dim: int, index: Value, value: float) -> Result:
    """Along the last dim, in rows that index and x have in common: an element is replaced where an index names it."""
    last = x.type.rank - 1
    if last < 0 or axis(dim, x.type.rank) != last or x.shape[:-1] != index.shape[:-1]:
        return None
    named = _as_row(ctx, ctx.cast(index, DType.i64), x.shape[last])
    here = ctx.positions(x.shape[last], named.shape, last)
    hit = ctx.reduce("any", ctx.apply("eq", named, here), [last + 1], False)
    return ctx.apply("where", hit, ctx.const(value, x.dtype), x)
