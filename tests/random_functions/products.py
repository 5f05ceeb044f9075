"""Moves of a random function that sum: reductions and matrix products."""

from __future__ import annotations

import math

from sympy import Integer

from tilewright.ir.types import DType, TensorType, Value, concrete

from .draft import LARGEST, RandomFunction, Spec


def reduce(fn: RandomFunction) -> Value | None:
    x = fn.choose(lambda v: v.type.rank >= 1)
    if x is None:
        return None
    axes = {fn.number(0, x.type.rank - 1) for _ in range(fn.number(1, 2))}
    keepdim = bool(fn.number(0, 1))
    if x.dtype is DType.bool:
        return fn.reduced(x, str(fn.pick(("any", "all"))), tuple(sorted(axes)), keepdim)
    kinds = ["sum", "sum", "max", "min"]
    if math.prod(concrete(tuple(x.shape[n] for n in axes), fn.highs)) <= 4 and fn.specs[x].size <= 2:
        kinds.append("prod")
    return fn.reduced(x, str(fn.pick(kinds)), tuple(sorted(axes)), keepdim)


def project(fn: RandomFunction, x: Value, n: int, b: Value | None = None) -> Value:
    weight = b or fn.weight(TensorType(x.dtype, (Integer(n), x.shape[-1])))
    k = concrete((x.shape[-1],), fn.highs)[0]
    size = k * fn.specs[x].size * fn.specs[weight].size
    return fn.add("matmul", x, weight, spec=Spec(-size, size, False))


def linear(fn: RandomFunction) -> Value | None:
    x = fn.floats(lambda v: v.type.rank >= 1 and v.shape[-1].is_Integer and fn.numel(v.shape[:-1]) <= 256)
    if x is None:
        return None
    y = fn.bounded(project(fn, x, fn.number(1, 8)))
    if fn.number(0, 1):
        bias = fn.weight(TensorType(x.dtype, y.shape[-1:]))
        y = fn.add("add", y, bias, spec=fn.combined(fn.specs[y], Spec(-1, 1), lambda a, b: a + b))
    if fn.number(0, 2) == 0:
        fn.pool.append(y)
        return project(fn, x, fn.number(1, 4))
    return y


def batched_matmul(fn: RandomFunction) -> Value | None:
    x = fn.floats(lambda v: v.type.rank >= 2)
    y = fn.floats(
        lambda v: (
            x is not None
            and v.dtype is x.dtype
            and v.type.rank >= 2
            and v.shape[-1] == x.shape[-1]
            and (v.type.rank == 2 or v.shape[:-2] == x.shape[:-2])
            and fn.numel((*x.shape[:-1], v.shape[-2])) <= LARGEST
        )
    )
    return None if x is None or y is None else project(fn, x, 0, y)
