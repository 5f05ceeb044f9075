"""Products of a single row (decoding one sequence): sums of products in registers, as a matrix-vector product gains
nothing from tensor cores.

A program sums BLOCK_N x BLOCK_K products per iteration, or as many codes (see ``code_sums``). Weights that are computed
stay in float32; nothing asks for them in half precision. Blocks of weights are waited for in registers, or, in tiles of
three stages and more, are under way to shared memory while the ones before are summed.
"""

from __future__ import annotations

from collections.abc import Sequence

from sympy import Expr

from tilewright.ir.loops import Dot, Load

from .code_sums import CodeSums, code_sums
from .dependence import wait_for_predecessor
from .expression import Block, Context, Operand
from .product import N, ProductPrinter, index_range
from .row_loops import K, KBlock, RowLoop, Stage
from .text import Scope, ceil_div


class VectorPrinter(ProductPrinter):
    def emit(self, pid: str) -> Expr:
        base, tiles = self.base, ceil_div(self.columns, self.tile.block_n)
        pid = self.split_batch(pid, tiles)
        n = index_range(base, "n", pid, self.block_n, self.tile.block_n, self.columns, "")
        mask = base.bind(f"{n.mask}[:, None]", "nb_ok") if n.mask else ""
        self.down = Block(base.bind(f"{n.text}[:, None]", "nb"), mask, base, self.columns)
        loops = [code_sums(self, stage.reduces) if stage.dots else None for stage in self.stages]
        self._start(pid, [codes for codes in loops if codes is not None and codes.whole])
        loop = RowLoop(base, f"[{self.block_k}]", 0, False, "[]", wide=True, stages=self.tile.num_stages)
        for stage, codes in zip(self.stages, loops, strict=True):
            if codes is None:
                self._stage(stage, loop)
                continue
            if apart := tuple(r for r in stage.reduces if r not in codes.reduces):
                self._stage(Stage(stage.extent, apart), loop)
            codes.emit(pid, n)
        self.store(self.context.extended(self.column_axes, {N: n}), N)
        return tiles * self.batch

    def _start(self, pid: str, whole: Sequence[CodeSums]) -> None:
        """What may be done before the kernel before has ended: load weights where registers have room for all of a
        program's, or request the first ones."""
        if not whole or not self.tile.dependent:
            self.begin(self.context.extended(self.column_axes, {N: self.down}), "[None, :]")
            return
        for codes in whole:
            codes.load(pid)
        wait_for_predecessor(self.base)

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
