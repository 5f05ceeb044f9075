"""Joins matmuls that share their input into one with stacked weights (QKV; gate and up).

    matmul(x, w1), matmul(x, w2)  =>  y = matmul(x, concat(w1, w2)); y[.., :n1], y[.., n1:]

The concat is of weights alone, so ``fold_constants`` turns it into one prepared weight; the binding then makes the
original parameters views of that buffer. Only 2-D weights of one function are joined.
"""

from __future__ import annotations

from dataclasses import replace

import sympy

from tilewright.ir.index import IndexMap, index_symbols
from tilewright.ir.module import Function, Op
from tilewright.ir.types import TensorType, Value

from .base import Rewriter, parameters_first, per_function


def _group_key(op: Op, weights: set[Value]) -> tuple[Value, TensorType] | None:
    if op.opcode != "matmul":
        return None
    a, b = op.operands
    if b not in weights or b.type.rank != 2 or not b.shape[0].is_Integer:
        return None
    return a, TensorType(b.dtype, b.shape[1:])


def _function(function: Function) -> Function:
    function = function.with_ops(parameters_first(function.ops))
    weights = {op.result for op in function.ops if op.opcode == "param"}
    groups: dict[tuple[Value, TensorType], list[Op]] = {}
    for op in function.ops:
        if (key := _group_key(op, weights)) is not None and op not in groups.get(key, []):
            groups.setdefault(key, []).append(op)
    first = {ops[0]: ops for ops in groups.values() if len(ops) > 1}
    if not first:
        return function
    rewriter = Rewriter(function)
    for original, op in zip(function.ops, rewriter, strict=True):
        if original in first:
            _merge(rewriter, [o.with_operands(rewriter.table) for o in first[original]], op)
        elif op.results and op.results[0] in rewriter.table:
            continue
        else:
            rewriter.keep(op)
    return rewriter.finish()


def _merge(rewriter: Rewriter, ops: list[Op], first: Op) -> None:
    loc = replace(first.loc, module=" + ".join(dict.fromkeys(o.loc.module for o in ops if o.loc.module)))
    stacked = rewriter.add("concat", *(o.operands[1] for o in ops), loc=loc, axis=0)
    joined = rewriter.add("matmul", first.operands[0], stacked, loc=loc)
    start: sympy.Expr = sympy.Integer(0)
    for op in ops:
        index = index_symbols(op.result.type.rank)
        index_map = IndexMap(op.result.type.rank, (*index[:-1], index[-1] + start))
        part = rewriter.add("view", joined, loc=op.loc, type=op.result.type, map=index_map)
        rewriter.replace(op.result, part)
        start += op.operands[1].shape[0]


merge_matmuls = per_function(_function)
