"""Products of a single row (decoding one sequence): sums of products in registers, as a matrix-vector product gains
nothing from tensor cores.

A program sums BLOCK_N x BLOCK_K products per iteration. Weights that are stored as codes with a scale per group of
columns are walked group by group, in blocks of [columns, groups, columns of a group], so that a scale is loaded once
for its group. Where two columns share a byte (int4), the sum over k becomes two sums over bytes j,

    sum over k of a[k] * w[k]  =  sum over halves h, bytes j of a[k(j, h)] * w[k(j, h)],   k = 8 (j // 4) + 4 h + j % 4

in which both halves read the same byte: codes are loaded once, in whole vectors. Weights that are computed stay in
float32; nothing asks for them in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sympy import Expr, Integer

from tilewright.ir.index import FloorDiv, Mod, sym
from tilewright.ir.loops import Dot, Load, MatmulForm

from .expression import Block, Context, Operand
from .product import N, ProductPrinter, index_range
from .row_loops import K, KBlock, RowLoop, Stage, below
from .text import Scope, ceil_div, print_index

GROUP, PLACE = sym("group"), sym("place")


class VectorPrinter(ProductPrinter):
    def emit(self, pid: str) -> Expr:
        base, tiles = self.base, ceil_div(self.columns, self.tile.block_n)
        pid = self.split_batch(pid, tiles)
        n = index_range(base, "n", pid, self.block_n, self.tile.block_n, self.columns, "")
        mask = base.bind(f"{n.mask}[:, None]", "nb_ok") if n.mask else ""
        self.down = Block(base.bind(f"{n.text}[:, None]", "nb"), mask, base, self.columns)
        self.begin(self.context.extended(self.column_axes, {N: self.down}), "[None, :]")
        loop = RowLoop(base, f"[{self.block_k}]", 0, False, "[]", wide=True)
        codes = stored_codes(self.form)
        for stage in self.stages:
            if codes is None or not stage.dots:
                self._stage(stage, loop)
                continue
            if stage.reduces:
                self._stage(replace(stage, dots=()), loop)
            self._sum_codes(codes, n)
        self.store(self.context.extended(self.column_axes, {N: n}), N)
        return tiles * self.batch

    def _stage(self, stage: Stage, loop: RowLoop) -> None:
        context, base = self.context, self.base
        k = KBlock(self.block_k, self.tile.block_k, stage.extent)
        names = self.accumulators(f"[{self.block_n}, {self.block_k}]") if stage.dots and not k.whole else {}
        products: dict[Dot, str] = {}

        def body(scope: Scope, start: str) -> Context:
            row = context.extended({self.form.k.symbol: K}, {K: k.index(scope, start, "")})
            if stage.dots:
                products.update(self._multiply(scope, row, k.index(scope, start, "[None, :]", "kb"), names))
            return row

        loop.run(stage, k, body, context)
        for dot, text in products.items():
            context.bound[dot] = Operand(base.bind(f"tl.sum({text}, axis=1)", "dot"), base)

    def _multiply(self, scope: Scope, row: Context, across: Block, names: dict[Dot, str]) -> dict[Dot, str]:
        """Products of this block of k: added to the accumulators in a loop, else as they are."""
        column = self.context.extended({**self.column_axes, self.form.k.symbol: K}, {N: self.down, K: across})
        value = self.row_operand(scope, row, (K,), f"[{self.block_k}]")
        a = value.scope.bind(f"{value.text}.to({self.accumulator})[None, :]", "a")
        products = {}
        for dot in self.form.dots:
            b = column.shaped(
                self._factor(column, dot), dot.b, (N, K), f"[{self.block_n}, {self.block_k}]", "b"
            )
            product = f"{a} * {b.text}.to({self.accumulator})"
            if dot in names:
                scope.line(f"{names[dot]} += {product}")
            products[dot] = names[dot] if dot in names else scope.bind(product, "product")
        return products

    def _factor(self, column: Context, dot: Dot) -> Operand:
        """The right operand: as it is stored, or as it is computed."""
        return column.load(dot.b, convert=False) if isinstance(dot.b, Load) else column.named(dot.b)

    def _sum_codes(self, codes: Codes, n: Block) -> None:
        """The dots, group by group of the columns that share a scale."""
        base, size = self.base, max(1, self.tile.block_k // codes.group)
        groups = FloorDiv(self.form.k.extent, Integer(codes.group))
        block_g = base.constant("BLOCK_G", size)
        places = base.constant("PLACES", codes.group // codes.halves)
        shape = f"[{self.block_n}, {block_g}, {places}]"
        names = self.accumulators(shape)
        place = Block(
            base.bind(f"tl.arange(0, {places})[None, None, :]", "place"),
            "",
            base,
            Integer(codes.group // codes.halves),
        )
        mask = base.bind(f"{n.mask}[:, None, None]", "nc_ok") if n.mask else ""
        down = Block(base.bind(f"{n.text}[:, None, None]", "nc"), mask, base, self.columns)
        scope = base.open(f"for start in range(0, {print_index(groups)}, {block_g}):")
        g = scope.bind(f"(start + tl.arange(0, {block_g}))[None, :, None]", "g")
        even = groups.is_Integer and int(groups) % size == 0
        g_mask = "" if even else scope.bind(f"{g} < {print_index(groups)}", "g_ok")
        blocks = {GROUP: Block(g, g_mask, scope, groups), PLACE: place}
        for half in range(codes.halves):
            axes = {self.form.k.symbol: codes.column(half)}
            row = self.context.extended(axes, blocks)
            column = self.context.extended({**self.column_axes, **axes}, {**blocks, N: down})
            a = row.operand(self.form.a, self.operand)
            a = row.shaped(a, self.form.a, (GROUP, PLACE), f"[1, {block_g}, {places}]", "a")
            for dot, name in names.items():
                b = column.shaped(self._factor(column, dot), dot.b, (N, GROUP, PLACE), shape, "b")
                scope.line(f"{name} += {a.text}.to({self.accumulator}) * {b.text}.to({self.accumulator})")
        base.close(scope)
        for dot, name in names.items():
            self.context.bound[dot] = Operand(
                base.bind(f"tl.sum(tl.sum({name}, axis=2), axis=1)", "dot"), base
            )


@dataclass(frozen=True)
class Codes:
    """Weights in groups of ``group`` columns that share a scale, ``halves`` columns to a byte."""

    group: int
    halves: int

    def column(self, half: int) -> Expr:
        """Column k at a GROUP and a PLACE in it (of a byte, where two columns share one)."""
        start = self.group * GROUP
        if self.halves == 1:
            return start + PLACE
        return start + 8 * FloorDiv(PLACE, Integer(4)) + 4 * half + Mod(PLACE, Integer(4))


def stored_codes(form: MatmulForm) -> Codes | None:
    """How the weights of a product are stored, when they are codes with a scale per group of columns."""
    k = form.k.symbol
    loads = [n for d in form.dots for n in below(d.b) if isinstance(n, Load) and not n.indirect]
    indices = {e for load in loads for e in load.index if k in e.free_symbols}
    groups = {
        int(e.args[1]) for e in indices if isinstance(e, FloorDiv) and e.args[0] == k and e.args[1].is_Integer
    }
    packed = 4 * FloorDiv(k, Integer(8)) + Mod(k, Integer(4)) in indices
    extent = form.k.extent
    if not groups or not extent.is_Integer:
        return None
    group = max(groups)
    if group & (group - 1) or group % 8 or int(extent) % group:
        return None
    return Codes(group, 2 if packed else 1)
