"""Brings ops into one form, so that later passes see fewer shapes of the same thing.

    %1 = view %x {map = (i0, i1) -> (i1, i0)} : f32[4, 8]
    %2 = view %1 {map = (i0, i1) -> (i1, i0)} : f32[8, 4]       =>       (%x itself)

Rules, each named by its equation:
- view(view(x)) => view(x); an identity view => x; simplified index maps
- cast to the same dtype => x; cast(cast(x, wider), narrow) => cast(x, narrow)
- x * 1, x / 1, x + 0, x - 0 => x
- pow(x, 2) => x * x; pow(x, 1) => x; pow(x, -0.5) => rsqrt(x); pow(x, 0.5) => sqrt(x)
- concat of one => x
"""

from __future__ import annotations

from collections.abc import Mapping

from sympy import Expr, Integer, Symbol

from tilewright.ir.index import IndexMap, extents_of, simplify
from tilewright.ir.module import Function, Op
from tilewright.ir.types import DType, Value

from .base import Rewriter, parameters_first, per_function

_WIDER = {
    DType.f8: {DType.f16, DType.bf16, DType.f32, DType.f64},
    DType.f16: {DType.f32, DType.f64},
    DType.bf16: {DType.f32, DType.f64},
    DType.f32: {DType.f64},
}


def _view(op: Op, rewriter: Rewriter, made: dict[Value, Op]) -> Value | None:
    source, index_map = op.operands[0], op.attr("map")
    inner = made.get(source)
    if inner is not None and inner.opcode == "view":
        source = inner.operands[0]
        index_map = IndexMap(index_map.rank, inner.attr("map").apply(index_map.exprs))
    ranges = extents_of(op.result.shape)
    final = IndexMap(
        index_map.rank, tuple(_unit(e, d, ranges) for e, d in zip(index_map.exprs, source.shape, strict=True))
    )
    if source.shape == op.result.shape and all(
        e == s or d == 1 for e, s, d in zip(final.exprs, final.symbols, source.shape, strict=True)
    ):
        return source
    if final == op.attr("map") and source == op.operands[0]:
        return None
    return rewriter.add("view", source, type=op.result.type, map=final)


def _unit(expr: Expr, extent: Expr, ranges: Mapping[Symbol, Expr]) -> Expr:
    """The simplified index into a dim; 0 when the dim has size 1."""
    return Integer(0) if extent == 1 else simplify(expr, ranges)


def _cast(op: Op, rewriter: Rewriter, made: dict[Value, Op]) -> Value | None:
    (source,) = op.operands
    if source.dtype == op.result.dtype:
        return source
    inner = made.get(source)
    if inner is not None and inner.opcode == "cast":
        origin = inner.operands[0]
        if source.dtype in _WIDER.get(origin.dtype, ()) and op.result.dtype.is_float:
            if origin.dtype == op.result.dtype:
                return origin
            return rewriter.add("cast", origin, type=op.result.type)
    return None


_NEUTRAL = {"mul": 1, "div": 1, "add": 0, "sub": 0}


def _constant(value: Value, made: dict[Value, Op]) -> float | None:
    op = made.get(value)
    return op.attr("value") if op is not None and op.opcode == "const" else None


def _arithmetic(op: Op, rewriter: Rewriter, made: dict[Value, Op]) -> Value | None:
    a, b = op.operands
    if _constant(b, made) == _NEUTRAL[op.opcode] and a.type == op.result.type:
        return a
    if op.opcode in ("add", "mul") and _constant(a, made) == _NEUTRAL[op.opcode] and b.type == op.result.type:
        return b
    return None


def _pow(op: Op, rewriter: Rewriter, made: dict[Value, Op]) -> Value | None:
    x, exponent = op.operands
    if x.type != op.result.type:
        return None
    match _constant(exponent, made):
        case 1:
            return x
        case 2:
            return rewriter.add("mul", x, x)
        case 0.5:
            return rewriter.add("sqrt", x)
        case -0.5:
            return rewriter.add("rsqrt", x)
    return None


def _concat(op: Op, rewriter: Rewriter, made: dict[Value, Op]) -> Value | None:
    return op.operands[0] if len(op.operands) == 1 else None


_RULES = {
    "view": _view,
    "cast": _cast,
    "pow": _pow,
    "concat": _concat,
    **dict.fromkeys(_NEUTRAL, _arithmetic),
}


def _function(function: Function) -> Function:
    rewriter = Rewriter(function.with_ops(parameters_first(function.ops)))
    made: dict[Value, Op] = {}
    for op in rewriter:
        rule = _RULES.get(op.opcode)
        before = len(rewriter.ops)
        replacement = rule(op, rewriter, made) if rule else None
        if replacement is None:
            rewriter.keep(op)
        else:
            rewriter.replace(op.result, replacement)
        for new in rewriter.ops[before:]:
            made.update(dict.fromkeys(new.results, new))
    return rewriter.finish()


canonicalize = per_function(_function)
