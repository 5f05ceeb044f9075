"""Computes on heads as they lie, where a model flattens tokens and heads into rows for a while.

    %r = view %x {flattens [B, S, 4]} : f32[4*B*S, 32]         %2 = mul %x, %x : f32[B, S, 4, 32]
    %1 = mul %r, %r : f32[4*B*S, 32]                     =>    %3 = reduce %2 {axes = (3)} : f32[B, S, 4]
    %2 = reduce %1 {axes = (1)} : f32[4*B*S]                   %4 = view %3 {flattens [B, S, 4]} : f32[4*B*S]

A flattening whose last dim is a constant moves down through ops that treat rows alike, and meets, as a rule, the view
that undoes it. What is left are dims that stand alone in every index, as a product's rows and columns do: with
``i // 4 % S`` a product's results would be computed one by one. Norms of heads are written so (gated norms of linear
attention).
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy import Expr, Integer

from tilewright.ir.index import reshape_map
from tilewright.ir.module import Function, Op
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.types import TensorType, Value

from .base import Rewriter, per_function

Shape = tuple[Expr, ...]


@dataclass(frozen=True)
class _Merge:
    """A value is ``source`` with dims of the sizes ``parts`` made one, at ``at``."""

    source: Value
    at: int
    parts: Shape

    def split(self, shape: Shape, rank: int) -> Shape:
        """A shape that broadcasts to one of ``rank`` dims, with the dims apart that this merge makes one."""
        at = self.at - (rank - len(shape))
        if at < 0:
            return shape
        parts = (Integer(1),) * len(self.parts) if shape[at] == 1 else self.parts
        return (*shape[:at], *parts, *shape[at + 1 :])


def _merge_of(op: Op) -> _Merge | None:
    """What a view merges, if that and nothing else: tokens, of whose number nothing is known, and a constant number of
    heads."""
    (source,), shape = op.operands, op.result.shape
    extra = source.type.rank - len(shape)
    at = next((n for n, (a, b) in enumerate(zip(source.shape, shape, strict=False)) if a != b), None)
    if extra < 1 or at is None or source.shape[at + extra + 1 :] != shape[at + 1 :]:
        return None
    parts = source.shape[at : at + extra + 1]
    if not parts[-1].is_Integer or parts[-1] == 1 or sympy.prod(parts[:-1]).is_Integer:
        return None
    return _Merge(source, at, parts) if op.attr("map") == reshape_map(source.shape, shape) else None


def _pointwise(op: Op, rewriter: Rewriter, merges: dict[Value, _Merge]) -> _Merge | None:
    shape = op.result.shape
    merge = next((m for v in op.operands if (m := merges.get(v)) is not None and v.shape == shape), None)
    if merge is None:
        return None
    operands = []
    for value in op.operands:
        known, apart = merges.get(value), merge.split(value.shape, len(shape))
        if known is not None and known.source.shape == apart:
            operands.append(known.source)
        elif apart == value.shape:
            operands.append(value)
        else:
            operands.append(_reshaped(rewriter, value, apart))
    type = TensorType(op.result.dtype, merge.split(shape, len(shape)))
    result = rewriter.add(op.opcode, *operands, type=type, **dict(op.attrs))
    return _Merge(result, merge.at, merge.parts)


def _reduce(op: Op, rewriter: Rewriter, merges: dict[Value, _Merge]) -> _Merge | None:
    merge, axes = merges.get(op.operands[0]), op.attr("axes")
    if merge is None or merge.at in axes:
        return None
    more = len(merge.parts) - 1
    attrs = dict(op.attrs) | {"axes": tuple(a + more if a > merge.at else a for a in axes)}
    result = rewriter.add("reduce", merge.source, **attrs)
    gone = 0 if op.attr("keepdim") else sum(a < merge.at for a in axes)
    return _Merge(result, merge.at - gone, merge.parts)


def _reshaped(rewriter: Rewriter, value: Value, shape: Shape) -> Value:
    index_map = reshape_map(value.shape, shape)
    return rewriter.add("view", value, type=TensorType(value.dtype, shape), map=index_map)


def _function(function: Function) -> Function:
    rewriter = Rewriter(function)
    merges: dict[Value, _Merge] = {}
    for op in rewriter:
        moved = None
        if op.opcode in POINTWISE:
            moved = _pointwise(op, rewriter, merges)
        elif op.opcode == "reduce":
            moved = _reduce(op, rewriter, merges)
        elif op.opcode == "view" and (merge := _merge_of(op)) is not None:
            merges[op.result] = merge
        if moved is None:
            rewriter.keep(op)
        else:
            merged = _reshaped(rewriter, moved.source, op.result.shape)
            rewriter.replace(op.result, merged)
            merges[merged] = moved
    return rewriter.finish()


unmerge_dims = per_function(_function)
