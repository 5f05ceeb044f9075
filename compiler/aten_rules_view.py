"""Rules that move elements: every one is a view with an index map, a concat or a gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from sympy import Expr, prod

from tilewright.ir.index import FloorDiv, Mod, index_symbols
from tilewright.ir.types import DType, TensorType, Value

from .aten_rules import Context, Number, Result, axis, rule


@rule(
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int", "view_as.default",
    "reshape_as.default",
)  # fmt: skip
def _reshaped(ctx: Context, x: Value, *_: Any) -> Result:
    return ctx.reshape(x, ctx.out.shape)


@rule("unsqueeze.default")
def _unsqueeze(ctx: Context, x: Value, dim: int) -> Result:
    return ctx.unsqueeze(x, axis(dim, x.type.rank + 1))


@rule("squeeze.default", "squeeze.dim", "squeeze.dims")
def _squeeze(ctx: Context, x: Value, dim: int | Sequence[int] | None = None) -> Result:
    dims = range(x.type.rank) if dim is None else [dim] if isinstance(dim, int) else dim
    return ctx.drop(x, [n for n in (axis(d, x.type.rank) for d in dims) if x.shape[n] == 1])


@rule("transpose.int", "swapaxes.default")
def _transpose(ctx: Context, x: Value, dim0: int, dim1: int) -> Result:
    order = list(range(x.type.rank))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return ctx.permute(x, order)


@rule("permute.default")
def _permute(ctx: Context, x: Value, dims: Sequence[int]) -> Result:
    return ctx.permute(x, dims)


@rule("t.default")
def _t(ctx: Context, x: Value) -> Result:
    return ctx.transposed(x) if x.type.rank == 2 else x


@rule("numpy_T.default")
def _reversed(ctx: Context, x: Value) -> Result:
    return ctx.permute(x, range(x.type.rank)[::-1])


@rule("mT.default", "adjoint.default")
def _matrix_transpose(ctx: Context, x: Value) -> Result:
    return ctx.transposed(x)


@rule("movedim.int", "movedim.intlist")
def _movedim(ctx: Context, x: Value, source: int | Sequence[int], destination: int | Sequence[int]) -> Result:
    rank = x.type.rank
    sources = [axis(n, rank) for n in ([source] if isinstance(source, int) else source)]
    targets = [axis(n, rank) for n in ([destination] if isinstance(destination, int) else destination)]
    order = [n for n in range(rank) if n not in sources]
    for target, origin in sorted(zip(targets, sources, strict=True)):
        order.insert(target, origin)
    return ctx.permute(x, order)


@rule("expand.default", "broadcast_to.default", "expand_as.default")
def _expand(ctx: Context, x: Value, *_: Any, **__: Any) -> Result:
    return ctx.expand(x, ctx.out.shape)


# --- slices -------------------------------------------------------------------------------------------------------


def from_front(position: Number, size: Expr) -> Number | None:
    """A slice position counted from the front, or None when its sign is not known."""
    position = sympy.sympify(position)
    if position.is_nonnegative:
        return position
    shifted = size + position
    return sympy.expand(shifted) if position.is_negative and not shifted.is_negative else None


@rule("slice.Tensor")
def _slice(
    ctx: Context,
    x: Value,
    dim: int = 0,
    start: Number | None = None,
    end: Number | None = None,
    step: int = 1,
) -> Result:
    at = axis(dim, x.type.rank)
    first = from_front(0 if start is None else start, x.shape[at])
    return None if first is None else ctx.narrow(x, at, first, ctx.out.shape[at], step)


@rule("narrow.default")
def _narrow(ctx: Context, x: Value, dim: int, start: Number, length: Number) -> Result:
    return _slice(ctx, x, dim, start)


@rule("select.int")
def _select(ctx: Context, x: Value, dim: int, index: Number) -> Result:
    at = axis(dim, x.type.rank)
    position = from_front(index, x.shape[at])
    if position is None:
        return None
    return ctx.drop(ctx.narrow(x, at, position, sympy.Integer(1)), [at])


def _pieces(ctx: Context, x: Value, dim: int) -> tuple[Value, ...]:
    """Consecutive parts along ``dim``, of the sizes that the export declares."""
    at = axis(dim, x.type.rank)
    start: Expr = sympy.Integer(0)
    parts = []
    for out in ctx.outs:
        parts.append(ctx.narrow(x, at, start, out.shape[at]))
        start = start + out.shape[at]
    return tuple(parts)


@rule(
    "split.Tensor",
    "chunk.default",
    "split_with_sizes.default",
    "tensor_split.sections",
)
def _split(ctx: Context, x: Value, sizes: Any, dim: int = 0) -> Result:
    return _pieces(ctx, x, dim)


@rule("unbind.int")
def _unbind(ctx: Context, x: Value, dim: int = 0) -> Result:
    at = axis(dim, x.type.rank)
    one = sympy.Integer(1)
    return tuple(ctx.drop(ctx.narrow(x, at, n, one), [at]) for n in range(len(ctx.outs)))


# --- repeats ------------------------------------------------------------------------------------------------------


@rule("repeat.default", "tile.default")
def _repeat(ctx: Context, x: Value, repeats: Sequence[Number]) -> Result:
    shape = ctx.out.shape
    symbols = index_symbols(len(shape))[len(shape) - x.type.rank :]
    sizes = shape[len(shape) - x.type.rank :]
    pairs = zip(symbols, x.shape, sizes, strict=True)
    return ctx.view(x, shape, [s if d == size else 0 if d == 1 else Mod(s, d) for s, d, size in pairs])


@rule("repeat_interleave.self_int")
def _repeat_interleave(ctx: Context, x: Value, repeats: int, dim: int | None = None, **_: Any) -> Result:
    if dim is None:
        x, dim = ctx.reshape(x, (x.type.numel,)), 0
    symbols: list[Expr] = list(index_symbols(x.type.rank))
    at = axis(dim, x.type.rank)
    symbols[at] = FloorDiv(symbols[at], sympy.sympify(repeats))
    return ctx.view(x, ctx.out.shape, symbols)


@rule("flip.default")
def _flip(ctx: Context, x: Value, dims: Sequence[int]) -> Result:
    flipped = {axis(n, x.type.rank) for n in dims}
    symbols = index_symbols(x.type.rank)
    return ctx.view(
        x,
        x.shape,
        [d - 1 - s if n in flipped else s for n, (s, d) in enumerate(zip(symbols, x.shape, strict=True))],
    )


@rule("roll.default")
def _roll(ctx: Context, x: Value, shifts: int | Sequence[int], dims: Sequence[int] = ()) -> Result:
    amounts = [shifts] if isinstance(shifts, int) else list(shifts)
    if not dims:
        return None
    for amount, dim in zip(amounts, dims, strict=True):
        at = axis(dim, x.type.rank)
        size = x.shape[at]
        if not size.is_Integer:
            return None
        cut = sympy.Integer(-amount % int(size))
        tail, head = ctx.narrow(x, at, cut, size - cut), ctx.narrow(x, at, 0, cut)
        x = x if cut == 0 else ctx.builder.add("concat", tail, head, axis=at)
    return x


# --- joins --------------------------------------------------------------------------------------------------------


@rule("cat.default", "concat.default", "concatenate.default", takes_empty=True)
def _cat(ctx: Context, tensors: Sequence[Value], dim: int = 0) -> Result:
    """Parts without elements add nothing, such as what a rotary embedding of all channels leaves as it is."""
    if 0 in ctx.out.shape:
        return None
    at = axis(dim, ctx.out.rank)
    parts = [ctx.cast(t, ctx.out.dtype) for t in tensors if 0 not in t.shape]
    return parts[0] if len(parts) == 1 else ctx.builder.add("concat", *parts, axis=at)


@rule("stack.default")
def _stack(ctx: Context, tensors: Sequence[Value], dim: int = 0) -> Result:
    at = axis(dim, ctx.out.rank)
    return ctx.builder.add(
        "concat", *(ctx.unsqueeze(ctx.cast(t, ctx.out.dtype), at) for t in tensors), axis=at
    )


@rule("constant_pad_nd.default", "pad.default")
def _pad(
    ctx: Context, x: Value, pad: Sequence[Number], mode: Any = "constant", value: Number | None = None
) -> Result:
    if not isinstance(mode, str):
        mode, value = "constant", mode
    if mode != "constant":
        return None
    for n, amounts in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        at = x.type.rank - 1 - n
        low, high = (sympy.sympify(a) for a in amounts)
        if not (low.is_nonnegative and high.is_nonnegative):
            return None
        x = padded(ctx, x, at, low, high, value or 0)
    return x


def padded(ctx: Context, x: Value, at: int, low: Expr, high: Expr, value: Number) -> Value:
    """x with so many elements of one value before and after those of dim ``at``."""
    fill = ctx.const(value, x.dtype)
    parts = [x]
    for amount, where in ((low, 0), (high, 1)):
        if amount != 0:
            shape = [amount if n == at else d for n, d in enumerate(x.shape)]
            parts.insert(where * len(parts), ctx.expand(fill, shape))
    return x if len(parts) == 1 else ctx.builder.add("concat", *parts, axis=at)


# --- lookups ------------------------------------------------------------------------------------------------------


@rule("embedding.default")
def _embedding(ctx: Context, weight: Value, indices: Value, *_: Any) -> Result:
    return ctx.builder.add("gather", weight, indices, axis=0)


def _wrapped(ctx: Context, index: Value, size: Expr) -> Value:
    """Indices from the front, where PyTorch lets negative ones count from the end."""
    return ctx.apply("where", ctx.apply("lt", index, 0), ctx.apply("add", index, size), index)


@rule("index_select.default")
def _index_select(ctx: Context, x: Value, dim: int, index: Value) -> Result:
    """A lookup by a row of indices; PyTorch takes a single one for a row of one, and keeps the dim."""
    index = ctx.unsqueeze(index, 0) if index.type.rank == 0 else index
    return ctx.builder.add("gather", x, index, axis=axis(dim, x.type.rank))


@rule("index.Tensor")
def _index(ctx: Context, x: Value, indices: Sequence[Value | None]) -> Result:
    """Integers for dims that stand side by side: a lookup in these dims as one."""
    given = [(n, index) for n, index in enumerate(indices) if index is not None]
    dims = [n for n, _ in given]
    if not dims or not all(index.dtype.is_int for _, index in given):
        return None
    first, behind = dims[0], dims[-1] + 1
    if dims != list(range(first, behind)):
        return None
    shape = ctx.out.shape[first : ctx.out.rank - (x.type.rank - behind)]
    sizes = x.shape[first:behind]
    places = [
        _wrapped(ctx, ctx.expand(ctx.cast(index, DType.i64), shape), size)
        for (_, index), size in zip(given, sizes, strict=True)
    ]
    place = places[0]
    for size, after in zip(sizes[1:], places[1:], strict=True):
        place = ctx.apply("add", ctx.apply("mul", place, size), after)
    flat = ctx.reshape(x, (*x.shape[:first], prod(sizes), *x.shape[behind:]))
    return ctx.builder.add("gather", flat, place, axis=first)


# --- new tensors --------------------------------------------------------------------------------------------------


def _filled(ctx: Context, value: Number) -> Value:
    return ctx.expand(ctx.const(value, ctx.out.dtype), ctx.out.shape)


@rule("zeros.default", "zeros_like.default", "new_zeros.default", "empty.memory_format", "empty_like.default",
      "new_empty.default")  # fmt: skip
def _zeros(ctx: Context, *_: Any, **__: Any) -> Result:
    return _filled(ctx, 0)


@rule("ones.default", "ones_like.default", "new_ones.default")
def _ones(ctx: Context, *_: Any, **__: Any) -> Result:
    return _filled(ctx, 1)


@rule("full.default", "full_like.default", "new_full.default")
def _full(ctx: Context, shape_or_like: Any, *rest: Any, **__: Any) -> Result:
    return _filled(ctx, rest[-1])


@rule("scalar_tensor.default")
def _scalar_tensor(ctx: Context, value: Number, **_: Any) -> Result:
    return ctx.const(value, ctx.out.dtype)


@rule("arange.default", "arange.start", "arange.start_step")
def _arange(ctx: Context, *bounds: Number, step: Number = 1, **_: Any) -> Result:
    """``start + step * n``. Integers count in int64, floats in the type of the result."""
    start = bounds[0] if len(bounds) > 1 else 0
    step = bounds[2] if len(bounds) > 2 else step
    counts = ctx.builder.add("iota", type=TensorType(DType.i64, ctx.out.shape))
    values = ctx.cast(counts, ctx.wide(ctx.out.dtype)) if ctx.out.dtype.is_float else counts
    if step != 1:
        values = ctx.apply("mul", values, step)
    if start != 0:
        values = ctx.apply("add", values, start)
    return ctx.cast(values, ctx.out.dtype)


def _triangle(ctx: Context, x: Value, diagonal: int, compare: str) -> Value:
    rank = x.type.rank
    rows = ctx.positions(x.shape[-2], x.shape, rank - 2)
    columns = ctx.positions(x.shape[-1], x.shape, rank - 1)
    kept = ctx.apply(compare, columns, ctx.apply("add", rows, diagonal))
    return ctx.apply("where", kept, x, ctx.const(0, x.dtype))


@rule("tril.default")
def _tril(ctx: Context, x: Value, diagonal: int = 0) -> Result:
    return _triangle(ctx, x, diagonal, "le")


@rule("triu.default")
def _triu(ctx: Context, x: Value, diagonal: int = 0) -> Result:
    return _triangle(ctx, x, diagonal, "ge")
