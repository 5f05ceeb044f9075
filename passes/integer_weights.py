"""Weights as small integers, which a product turns back into floats as it reads them.

How codes lie in memory is an index map: with ``options.row_block`` = 16, sixteen rows are interleaved four columns at a
time, the order in which a CPU kernel with one row per lane reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sympy import Expr, Integer

from tilewright.ir.index import FloorDiv, IndexMap, Mod, index_symbols
from tilewright.ir.module import Loc, Names, Op, make_attrs
from tilewright.ir.quantization import CODES
from tilewright.ir.types import TensorType, Value

from .base import PassOptions, Rewriter

GROUP = 32
"""Columns that share a scale where a row has several, and activations that share one in any form."""


@dataclass(frozen=True)
class IntegerForm:
    """Codes of ``bits`` bits with factors for each ``group`` columns, or for a whole row where that is None."""

    bits: int
    group: int | None
    rounds: ClassVar[bool] = True

    def fits(self, rows: int, columns: int, options: PassOptions) -> bool:
        """Columns in whole groups and rows in whole blocks."""
        return rows % options.row_block == 0 and columns % GROUP == 0

    def store(
        self, weight: Value, stem: str, names: Names, loc: Loc, options: PassOptions
    ) -> tuple[list[Op], dict[str, Value]]:
        called = [f"{stem}.int{self.bits}.{what}" for what in ("codes", *CODES[self.bits].factors)]
        blocked = options.row_block > 1
        parts = tuple(
            Value(names.fresh("q" if blocked else name), type)
            for name, type in zip(called, self._types(weight), strict=True)
        )
        attrs = make_attrs({"bits": self.bits, "group": self._group(weight)})
        ops = [Op("quantize", (weight,), attrs, parts)]
        stored = dict(zip(called, parts, strict=True))
        if blocked:
            for number, (name, part) in enumerate(stored.items()):
                index_map, shape = _into_blocks(part, options.row_block, codes=number == 0)
                stored[name] = Value(names.fresh(name), TensorType(part.dtype, shape))
                ops.append(Op("view", (part,), make_attrs({"map": index_map}), (stored[name],)))
        return ops, stored

    def read(
        self, rewriter: Rewriter, weight: Value, stored: tuple[Value, ...], options: PassOptions
    ) -> Value:
        parts = stored
        if options.row_block > 1:
            parts = tuple(
                rewriter.add(
                    "view", part, type=type, map=_out_of_blocks(type.shape, options.row_block, n == 0)
                )
                for n, (part, type) in enumerate(zip(stored, self._types(weight), strict=True))
            )
        return rewriter.add("dequantize", *parts, type=weight.type, bits=self.bits, group=self._group(weight))

    def multiply(self, rewriter: Rewriter, op: Op, stored: tuple[Value, ...], options: PassOptions) -> None:
        weight = op.operands[1]
        op = op.with_operands({weight: self.read(rewriter, weight, stored, options)})
        if options.activation_group:
            op = op.with_attrs(activation_group=options.activation_group)
        rewriter.keep(op)

    def _group(self, weight: Value) -> int:
        return int(weight.shape[1]) if self.group is None else self.group

    def _types(self, weight: Value) -> tuple[TensorType, ...]:
        rows, columns = weight.shape
        return CODES[self.bits].types(rows, columns, self._group(weight))


def _into_blocks(part: Value, block: int, codes: bool) -> tuple[IndexMap, tuple[Expr, ...]]:
    """How codes [N, J] are stored as [N / block, J / 4, block, 4], and scales [N, G] as [N / block, G, block]."""
    rows, columns = part.shape
    if codes:
        i0, i1, i2, i3 = index_symbols(4)
        return IndexMap(4, (block * i0 + i2, 4 * i1 + i3)), (
            rows / block,
            columns / 4,
            Integer(block),
            Integer(4),
        )
    i0, i1, i2 = index_symbols(3)
    return IndexMap(3, (block * i0 + i2, i1)), (rows / block, columns, Integer(block))


def _out_of_blocks(shape: tuple[Expr, ...], block: int, codes: bool) -> IndexMap:
    i0, i1 = index_symbols(2)
    size, four = Integer(block), Integer(4)
    if codes:
        return IndexMap(2, (FloorDiv(i0, size), FloorDiv(i1, four), Mod(i0, size), Mod(i1, four)))
    return IndexMap(2, (FloorDiv(i0, size), i1 if shape[1] != 1 else Integer(0), Mod(i0, size)))
