"""Products of several rows of int8 with int8 weights on tensor cores, where runs of a row share a scale.

With a[m, k] = step[m, k // group] * byte[m, k] and w[n, k] = scale[n] * code[n, k],

    sum over k of a[m, k] * w[n, k]  =  scale[n] * sum over groups g of step[m, g] * S[m, n, g]
    S[m, n, g]                       =  sum over k in g of byte[m, k] * code[n, k]

The sums S of several groups are one product of integers: the bytes of a row stand in as many columns of the right
factor, in each of them one group's and zeros elsewhere. That multiplies most numbers in vain, by zero, on units that
would else wait for memory, and needs no block of the weights to be cut into groups, which Triton cannot do:

    for start in range(0, K, BLOCK_K):                                      # of two groups
        x = tl.load(bytes .., mask=own, other=0)                            # [BLOCK_K, 2 * BLOCK_M]
        sums = tl.dot(tl.load(codes ..), x, bias, out_dtype=tl.int32)       # [BLOCK_N, 2 * BLOCK_M]
        sums = sums.to(tl.float32, bitcast=True) - 12582912.0
        part, part_1 = tl.split(..)                                         # [BLOCK_N, BLOCK_M] each, in registers
        acc += part * step
        acc += part_1 * step_1

Weights stand on the left, so that few rows are the short side (see ``matmul``). Integers become floats by a
subtraction: sums start from the bits of 3 * 2^22 (12582912.0), whose last bits count ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.ir.loops import Dot, Load

from .codes import GROUP, Weight, row_group, weight_of
from .expression import Block
from .product import M, N, ProductPrinter
from .row_loops import K, loop_range
from .text import Scope, print_index

_BIAS = 0x4B400000
"""The bits of 3 * 2^22 as float32; integers below 2^22 beside it are exact."""


def integer_tiles(printer: ProductPrinter) -> IntegerTiles | None:
    """How a tile of a product multiplies integers; None where the product, or its tile, has no such form."""
    form, tile = printer.form, printer.tile
    group, rows = row_group(form), weight_of(form.a)
    if not group or rows is None or not tile.transposed or tile.block_k % group:
        return None
    if int(form.k.extent) % tile.block_k or tile.block_k // group & (tile.block_k // group - 1):
        return None
    return IntegerTiles(printer, rows, group, {d: w for d in form.dots if (w := weight_of(d.b)) is not None})


@dataclass(frozen=True)
class IntegerTiles:
    """Prints the loop. ``rows``: codes and scales of the left operand, ``group`` columns to a scale."""

    printer: ProductPrinter
    rows: Weight
    group: int
    weights: dict[Dot, Weight]

    def emit(self, m: Block, n: Block, first: str) -> dict[Dot, str]:
        """Sums of the dots, without the weights' scales: blocks of columns ``n``, down, x rows ``m``. first:
        what is added to a row of the tile, "" for the only one. Gives their names."""
        printer, base, tile = self.printer, self.printer.base, self.printer.tile
        count, extent = tile.block_k // self.group, printer.form.k.extent
        block_m, block_k = base.constant("BLOCK_M", tile.block_m), printer.block_k
        names = printer.accumulators(f"[{printer.block_n}, {block_m}]")
        scope = base.open(f"for start in {loop_range(extent, block_k, 0)}:")
        k = scope.bind(f"start + tl.arange(0, {block_k})", "k")
        right = self._right(scope, k, first, count)
        group = scope.bind(f"start // {self.group}", "g")
        steps = [self._step(scope, m, f"({group} + {g})" if g else group) for g in range(count)]
        across = Block(f"{k}[None, :]", "", scope, extent)
        column = printer.context.extended(
            {**printer.column_axes, printer.form.k.symbol: K}, {N: n, K: across}
        )
        bias = base.bind(f"tl.full([{printer.block_n}, {block_m} * {count}], {_BIAS}, tl.int32)", "bias")
        for dot, name in names.items():
            left = column.load(_code(self.weights[dot]), convert=False).text
            sums = scope.bind(f"tl.dot({left}, {right}, {bias}, out_dtype=tl.int32)", "sums")
            sums = scope.bind(f"{sums}.to(tl.float32, bitcast=True) - {float(3 << 22)}", "sums")
            for part, step in zip(self._by_group(scope, sums, count, block_m), steps, strict=True):
                scope.line(f"{name} += {part} * {step}")
        base.close(scope)
        return names

    def _right(self, scope: Scope, k: str, first: str, count: int) -> str:
        """The bytes of the rows, [BLOCK_K, BLOCK_M * groups]: each group's by themselves, and zeros."""
        printer, base, block_m = self.printer, self.printer.base, self.printer.tile.block_m
        lane = base.bind(f"tl.arange(0, {block_m * count})", "lane")
        row = base.bind(f"({first}{lane} % {block_m})[None, :]", "row")
        within = base.bind(f"tl.arange(0, {printer.block_k})", "within")
        own = base.bind(f"({within} // {self.group})[:, None] == ({lane} // {block_m})[None, :]", "own")
        rows = printer.rows
        if not (rows.is_Integer and int(rows) % block_m == 0):
            own = base.bind(f"{own} & ({row} < {print_index(rows)})", "own")
        blocks = {M: Block(row, own, base, rows), K: Block(f"{k}[:, None]", "", scope, printer.form.k.extent)}
        axes = {**printer.row_axes, printer.form.k.symbol: K}
        return printer.context.extended(axes, blocks).load(_code(self.rows), convert=False).text

    def _step(self, scope: Scope, m: Block, group: str) -> str:
        """The scale of a group of each row, across."""
        printer, k = self.printer, self.printer.form.k
        at = Block(group, "", scope, k.extent / self.group)
        axes = {**printer.row_axes, k.symbol: self.group * GROUP}
        return printer.context.extended(axes, {M: m, GROUP: at}).named(self.rows.scale, "step").text

    def _by_group(self, scope: Scope, sums: str, count: int, block_m: str) -> list[str]:
        """Blocks [BLOCK_N, BLOCK_M] of the groups' sums, which lie beside each other: halves of halves, in
        registers."""
        if count == 1:
            return [sums]
        twos = count.bit_length() - 1
        shape = ", ".join([self.printer.block_n, *["2"] * twos, block_m])
        order = ", ".join(map(str, [0, twos + 1, *range(1, twos + 1)]))
        parts = [scope.bind(f"tl.permute(tl.reshape({sums}, [{shape}]), [{order}])", "parts")]
        for _ in range(twos):  # the last axis tells even groups from odd ones
            halves = [self._split(scope, part) for part in parts]
            parts = [half[0] for half in halves] + [half[1] for half in halves]
        return parts

    def _split(self, scope: Scope, part: str) -> tuple[str, str]:
        even, odd = scope.names.fresh("part"), scope.names.fresh("part")
        scope.line(f"{even}, {odd} = tl.split({part})")
        return even, odd


def _code(weight: Weight) -> Load:
    assert isinstance(weight.code, Load)
    return weight.code
