"""Moves of a random function that place elements elsewhere: views, joins and lookups."""

from __future__ import annotations

import sympy
from hypothesis import strategies as st
from sympy import Integer

from tilewright.ir.index import IndexMap, index_symbols, sym
from tilewright.ir.types import Value, concrete, tensor_type

from .draft import LARGEST, RandomFunction, Spec


def view(fn: RandomFunction) -> Value | None:
    x = fn.choose(lambda v: v.type.rank >= 1)
    if x is None:
        return None
    for _ in range(fn.number(1, 2)):
        x = _one_view(fn, x)
    return x


def _one_view(fn: RandomFunction, x: Value) -> Value:
    rank, shape = x.type.rank, x.shape
    kinds = ["insert"] + (["merge", "permute"] if rank >= 2 else []) + (["expand"] if rank <= 3 else [])
    static = [n for n, d in enumerate(shape) if d.is_Integer and d > 1]
    kinds += ["split", "slice", "half"] * bool(static) + ["squeeze"] * (Integer(1) in shape)
    kinds += ["last"] * any(not d.is_Integer for d in shape) + ["flip"] * (fn.flips and rank > 0)
    kind = fn.pick(kinds)
    axis: int = fn.number(0, max(rank - 1, 0))
    if kind == "permute":
        return fn.permute(x, tuple(fn.draw(st.permutations(range(rank)))))
    if kind == "merge":
        axis = fn.number(0, rank - 2)
        return fn.reshape(x, (*shape[:axis], sympy.expand(shape[axis] * shape[axis + 1]), *shape[axis + 2 :]))
    if kind == "insert":
        return fn.reshape(x, (*shape[:axis], Integer(1), *shape[axis:]))
    if kind == "squeeze":
        return fn.reshape(x, tuple(d for d in shape if d != 1))
    if kind == "expand":
        return _expand(fn, x, axis)
    if kind in ("split", "slice", "half"):
        axis = fn.pick(static)  # type: ignore[assignment]
        n = int(shape[axis])
        if kind == "slice":
            start, step = fn.number(0, n - 1), fn.number(1, 2)
            return fn.slice(x, axis, start, fn.number(1, 1 + (n - 1 - start) // step), step)
        if kind == "half" and n % 2 == 0:
            return fn.slice(x, axis, n // 2 * fn.number(0, 1), n // 2)
        factor = Integer(fn.pick([f for f in range(1, n + 1) if n % f == 0]))
        return fn.reshape(x, (*shape[:axis], factor, Integer(n // factor), *shape[axis + 1 :]))
    exprs = list(index_symbols(rank))
    if kind == "flip":
        exprs[axis] = shape[axis] - 1 - exprs[axis]
        return fn.view(x, shape, IndexMap(rank, tuple(exprs)))
    axis = fn.pick([n for n, d in enumerate(shape) if not d.is_Integer])  # type: ignore[assignment]
    exprs[axis] = shape[axis] - 1
    return fn.view(x, (*shape[:axis], Integer(1), *shape[axis + 1 :]), IndexMap(rank, tuple(exprs)))


def _expand(fn: RandomFunction, x: Value, axis: int) -> Value:
    """Repeat along a new axis, or along one of size 1."""
    extent = fn.pick((sym("B"), sym("S"), Integer(2), Integer(3)))
    if fn.numel(x.shape) * concrete((extent,), fn.highs)[0] > LARGEST:  # type: ignore[arg-type]
        return x
    if x.type.rank > axis and x.shape[axis] == 1:
        exprs = list(index_symbols(x.type.rank))
        exprs[axis] = Integer(0)
        shape = (*x.shape[:axis], extent, *x.shape[axis + 1 :])
        return fn.view(x, shape, IndexMap(len(shape), tuple(exprs)))  # type: ignore[arg-type]
    symbols = index_symbols(x.type.rank + 1)
    shape = (*x.shape[:axis], extent, *x.shape[axis:])
    return fn.view(x, shape, IndexMap(len(shape), (*symbols[:axis], *symbols[axis + 1 :])))  # type: ignore[arg-type]


def concat(fn: RandomFunction) -> Value | None:
    x = fn.choose(lambda v: v.type.rank >= 1)
    if x is None:
        return None
    axis = fn.number(0, x.type.rank - 1)
    parts = [x]
    for _ in range(fn.number(0, 2)):
        other = fn.choose(
            lambda v: (
                v.dtype is x.dtype
                and v.type.rank == x.type.rank
                and all(a == b for n, (a, b) in enumerate(zip(v.shape, x.shape, strict=True)) if n != axis)
            )
        )
        if other is not None:
            parts.insert(fn.number(0, len(parts)), other)
    if sum(fn.numel(v.shape) for v in parts) > LARGEST:
        return None
    known = [fn.specs[v] for v in parts]
    spec = Spec(min(s.low for s in known), max(s.high for s in known), all(s.raw for s in known))
    return fn.add("concat", *parts, spec=spec, axis=axis)


def gather(fn: RandomFunction) -> Value | None:
    index = fn.choose(lambda v: v.dtype.is_int and fn.specs[v].low >= 0 and fn.specs[v].high < 12)
    if index is None:
        index = fn.add("iota", type=tensor_type("i64", [fn.number(1, 5)]), spec=Spec(0, 4))
    rows = int(fn.specs[index].high) + 1
    table = fn.floats(lambda v: any(d.is_Integer and d >= rows for d in v.shape))
    if table is None or fn.number(0, 2):
        table = fn.weight(tensor_type(fn.dtype, [rows + fn.number(0, 2), fn.number(1, 6)]))
        fn.pool.append(table)
    axis = fn.pick([n for n, d in enumerate(table.shape) if d.is_Integer and d >= rows])
    if fn.numel(table.shape) * fn.numel(index.shape) > LARGEST:
        return None
    return fn.add("gather", table, index, spec=fn.specs[table], axis=axis)
