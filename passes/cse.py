"""Computes equal expressions once.

%1 = exp %x : f32[4]
%2 = exp %x : f32[4]                      %1 = exp %x : f32[4]
%3 = add %1, %2 : f32[4]      =>          %3 = add %1, %1 : f32[4]
"""

from __future__ import annotations

from tilewright.ir.module import Function, Op
from tilewright.ir.types import TensorType, Value

from .base import Rewriter, per_function
from .dce import has_effect


def _key(op: Op) -> tuple[object, ...]:
    attrs = tuple((k, type(v).__name__, repr(v) if isinstance(v, float) else v) for k, v in op.attrs)
    types: tuple[TensorType, ...] = tuple(v.type for v in op.results)
    return (op.opcode, op.operands, attrs, types)


def _function(function: Function) -> Function:
    rewriter = Rewriter(function)
    seen: dict[tuple[object, ...], tuple[Value, ...]] = {}
    for op in rewriter:
        known = None if has_effect(op) or op.body else seen.setdefault(_key(op), op.results)
        if known is None or known == op.results:
            rewriter.keep(op)
            continue
        for old, new in zip(op.results, known, strict=True):
            rewriter.replace(old, new)
    return rewriter.finish()


eliminate_common_subexpressions = per_function(_function)
