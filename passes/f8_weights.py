"""Weights in f8 (e4m3), with a scale per output channel that a product applies to its sums.

    %w = param {name = "up.weight"} : bf16[64, 32]
    %y = matmul %x, %w : bf16[B, S, 64]
=>
    %c = param {name = "prepared.up.weight.f8.codes"} : f8[64, 32]
    %s = param {name = "prepared.up.weight.f8.scale"} : f32[64, 1]
    %1 = cast %c : bf16[64, 32]
    %2 = matmul %x, %1 {wide = 1} : f32[B, S, 64]
    %3 = view %s {map = (i0) -> (i0, 0)} : f32[64]
    %4 = mul %2, %3 : f32[B, S, 64]
    %y = cast %4 : bf16[B, S, 64]

An f8 is exact in every wider type, so the product is that of the numbers that are stored. The largest weight of a row
becomes the largest f8. (The format and the scaling by row: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sympy import Integer

from tilewright.ir.builder import Builder
from tilewright.ir.index import IndexMap, index_symbols
from tilewright.ir.module import Loc, Names, Op
from tilewright.ir.types import F8_LARGEST, DType, TensorType, Value

from .base import PassOptions, Rewriter


@dataclass(frozen=True)
class F8Form:
    """Codes f8[N, K] and their scale f32[N, 1]."""

    rounds: ClassVar[bool] = False

    def fits(self, rows: int, columns: int, options: PassOptions) -> bool:
        """Any sides do."""
        return True

    def store(
        self, weight: Value, stem: str, names: Names, loc: Loc, options: PassOptions
    ) -> tuple[list[Op], dict[str, Value]]:
        """The scale is 1 for a row of zeros."""
        builder = Builder(names, loc)
        wide = builder.add("cast", weight, type=weight.type.with_dtype(DType.f32))
        size = builder.add("abs", wide)
        top = builder.add("reduce", size, kind="max", axes=(1,), keepdim=True)
        scale = builder.add("div", top, builder.const(F8_LARGEST, DType.f32))
        zero = builder.add("eq", top, builder.const(0.0, DType.f32))
        scale = builder.add("where", zero, builder.const(1.0, DType.f32), scale, hint=f"{stem}.f8.scale")
        codes = builder.add("div", wide, scale)
        codes = builder.add("cast", codes, type=weight.type.with_dtype(DType.f8), hint=f"{stem}.f8.codes")
        return builder.ops, {codes.name: codes, scale.name: scale}

    def read(
        self, rewriter: Rewriter, weight: Value, stored: tuple[Value, ...], options: PassOptions
    ) -> Value:
        codes, scale = stored
        wide = rewriter.add("cast", codes, type=weight.type.with_dtype(DType.f32))
        return rewriter.add("cast", rewriter.add("mul", wide, scale), type=weight.type)

    def multiply(self, rewriter: Rewriter, op: Op, stored: tuple[Value, ...], options: PassOptions) -> None:
        """The codes as they are, then each channel's sum by its scale."""
        (x, weight), (codes, scale) = op.operands, stored
        factor = rewriter.add("cast", codes, type=weight.type)
        product = rewriter.add("matmul", x, factor, wide=1)
        (i,) = index_symbols(1)
        row = rewriter.add(
            "view",
            scale,
            type=TensorType(DType.f32, scale.shape[:1]),
            map=IndexMap(1, (i, Integer(0))),
        )
        if row.dtype is not product.dtype:
            row = rewriter.add("cast", row, type=row.type.with_dtype(product.dtype))
        scaled = rewriter.add("mul", product, row)
        rewriter.replace(op.result, rewriter.add("cast", scaled, type=op.result.type))
