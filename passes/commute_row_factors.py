"""Moves factors that are constant along a row past a matmul, so that the product can start before they are known.

    matmul(x * r, w)  =>  matmul(x, w) * r          where r has one value per row: shape [.., 1]

For RMSNorm, ``r = rsqrt(mean(x^2) + eps)``: the sum of squares then runs in the same loop over K as the product. The
factor is found through products and float casts. Not done in f16, whose range the unscaled product may leave.
"""

from __future__ import annotations

from tilewright.ir.module import Function, Module, Op
from tilewright.ir.types import DType, Value

from .base import PassOptions, Rewriter, per_function


def _is_row_factor(value: Value, product: Value) -> bool:
    return value.type.rank == product.type.rank and value.shape[-1] == 1 and product.shape[-1] != 1


def _find(value: Value, made: dict[Value, Op]) -> list[Op] | None:
    """The path of ops from ``value`` down to a product with a row factor, that product last."""
    op = made.get(value)
    if op is None or value.dtype is DType.f16:
        return None
    if op.opcode == "cast" and op.operands[0].dtype.is_float:
        rest = _find(op.operands[0], made)
        return [op, *rest] if rest else None
    if op.opcode != "mul":
        return None
    if any(_is_row_factor(v, value) for v in op.operands):
        return [op]
    for operand in op.operands:
        # A square, mul(a, a), holds the factor twice.
        once = op.operands.count(operand) == 1
        if once and operand.shape == value.shape and (rest := _find(operand, made)):
            return [op, *rest]
    return None


def _strip(rewriter: Rewriter, path: list[Op]) -> tuple[Value, Value]:
    """Rebuild the path without its row factor; gives the new value and the factor."""
    *above, product = path
    a, b = product.operands
    value, factor = (a, b) if _is_row_factor(b, product.result) else (b, a)
    old = product.result
    for op in reversed(above):
        operands = tuple(value if v == old else v for v in op.operands)
        old = op.result
        value = rewriter.add(op.opcode, *operands, loc=op.loc, type=op.result.type, **dict(op.attrs))
    return value, factor


def _function(function: Function) -> Function:
    rewriter = Rewriter(function)
    made: dict[Value, Op] = {}
    for op in rewriter:
        path = _find(op.operands[0], made) if op.opcode == "matmul" else None
        if path is None or op.result.dtype is DType.f16:
            rewriter.keep(op)
        else:
            rewriter.replace(op.result, _commute(rewriter, op, path))
        made.update(dict.fromkeys(rewriter.ops[-1].results, rewriter.ops[-1]))
    return rewriter.finish()


def _commute(rewriter: Rewriter, op: Op, path: list[Op]) -> Value:
    """The matmul without the factor, times the factor in the factor's own (wider) dtype."""
    bare, factor = _strip(rewriter, path)
    product = rewriter.add("matmul", bare, op.operands[1])
    wide = rewriter.add("cast", product, type=product.type.with_dtype(factor.dtype))
    scaled = rewriter.add("mul", wide, factor)
    return rewriter.add("cast", scaled, type=op.result.type)


def commute_row_factors(module: Module, options: PassOptions) -> Module:
    """See above. Rows that are read from memory as they are multiplied have their factors already."""
    return module if options.plain_rows else per_function(_function)(module, options)
