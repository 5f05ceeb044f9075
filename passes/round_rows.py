"""Rounds the rows of products with integer weights before the products, once for all of their tiles of columns.

    %y = matmul %x, %w {activation_group = 32} : bf16[8, 1, 4096]                 # %w: dequantize of codes
=>
    %1 = view %x {map = (i0, i1) -> (i0, 0, i1)} : bf16[8, 4096]
    %2, %3 = quantize %1 {bits = 8, group = 32} : (i8[8, 4096], f32[8, 128])
    %4 = dequantize %2, %3 {bits = 8, group = 32} : bf16[8, 4096]
    %5 = view %4 {map = (i0, i1, i2) -> (i0, i2)} : bf16[8, 1, 4096]
    %y = matmul %5, %w : bf16[8, 1, 4096]

A product with codes on both sides multiplies integers. One row is rounded as well by every program that needs it; of
several, that would take longer than the product (of eight rows, twenty instructions for an element in each program).
"""

from __future__ import annotations

from functools import partial

from sympy import Integer, prod

from tilewright.ir.index import reshape_map
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.types import TensorType, Value

from .base import PassOptions, Rewriter, per_function


def round_rows(module: Module, options: PassOptions) -> Module:
    """See above; of the products that ``options.round_rows`` names."""
    if not options.round_rows:
        return module
    return per_function(partial(_function, bytes_only=options.round_rows == "bytes"))(module, options)


def _function(function: Function, bytes_only: bool) -> Function:
    rewriter, made = Rewriter(function), function.definitions()
    for op in rewriter:
        if _rounds(op) and not (bytes_only and not _is_byte(made.get(op.operands[1]))):
            rewriter.replace(op.result, _rounded(rewriter, op))
        else:
            rewriter.keep(op)
    return rewriter.finish()


def _rounds(op: Op) -> bool:
    """True for a product of a known number of rows that may be rounded, with a matrix."""
    if op.opcode != "matmul" or not op.attr("activation_group", 0):
        return False
    x, weight = op.operands
    return weight.type.rank == 2 and all(extent.is_Integer for extent in x.shape)


def _is_byte(weight: Op | None) -> bool:
    """True for a matrix of int8 with one scale to a row."""
    if weight is None or weight.opcode != "dequantize" or weight.attr("bits") != 8:
        return False
    return bool(weight.operands[1].shape[-1] == 1)


def _rounded(rewriter: Rewriter, op: Op) -> Value:
    x, weight = op.operands
    group = int(op.attr("activation_group"))
    rows = TensorType(x.dtype, (prod(x.shape[:-1], start=Integer(1)), x.shape[-1]))

    def reshaped(value: Value, type: TensorType) -> Value:
        return rewriter.add("view", value, type=type, map=reshape_map(value.shape, type.shape))

    codes = rewriter.add_multi("quantize", reshaped(x, rows), bits=8, group=group)
    value = rewriter.add("dequantize", *codes, type=rows, bits=8, group=group)
    attrs = {name: found for name, found in op.attrs if name != "activation_group"}
    return rewriter.add("matmul", reshaped(value, x.type), weight, type=op.result.type, **attrs)
