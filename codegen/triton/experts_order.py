"""The order of (token, chosen expert) pairs by expert: a program per expert, and one for what nobody needs.

Each program counts what all experts were chosen, which tells where its own run of blocks begins, and then places its
own pairs there: no program waits for another. Reading all ids twice in each of them is little beside the products that
follow, and keeps an expert's pairs in their own order, as atomic counters would not.
"""

from __future__ import annotations

import sympy
from sympy import Expr, Integer

from tilewright.ir.index import reshape_map, sym
from tilewright.ir.loops import Load
from tilewright.ir.module import Op
from tilewright.ir.types import Value, next_power_of_two

from .expression import Block, Context
from .text import Scope, print_index
from .tiling import Tile

PAIR = sym("i0")


def emit_experts_order(op: Op, tile: Tile, context: Context, pid: str) -> Expr:
    """Emit the kernel into ``context.base``. Returns the number of programs."""
    return _Order(op, tile, context, pid).emit()


class _Order:
    def __init__(self, op: Op, tile: Tile, context: Context, pid: str) -> None:
        self.context, self.base, self.expert = context, context.base, pid
        (self.ids,), (self.order, self.block_expert) = op.operands, op.results
        self.experts, self.block = int(op.attr("experts")), int(op.attr("block"))
        self.pairs = sympy.expand(self.ids.type.numel)
        self.nobody = self.experts + 1
        """What lanes without a pair are said to have chosen: no expert's number, nor that of the last program."""
        self.bins = self.base.constant("BINS", next_power_of_two(self.nobody + 1))
        self.lanes = self.base.constant("BLOCK_N", tile.block_n)

    def emit(self) -> Expr:
        base, expert, block = self.base, self.expert, self.block
        bins = base.bind(f"tl.arange(0, {self.bins})", "bins")
        blocks = base.bind(f"({self._counts(bins)} + {block - 1}) // {block}", "blocks")
        first = base.bind(f"tl.sum(tl.where({bins} < {expert}, {blocks}, 0), axis=0)", "first")
        own = base.bind(f"tl.sum(tl.where({bins} == {expert}, {blocks}, 0), axis=0)", "own")
        most = print_index(self.block_expert.shape[0])
        after = base.bind(f"tl.where({expert} == {self.experts}, {most}, {first} + {own})", "after")
        place = self._place(first)
        self._fill(self._name(self.order), place, f"{after} * {block}", print_index(self.pairs))
        self._fill(self._name(self.block_expert), first, after, expert)
        return Integer(self.experts + 1)

    def _counts(self, bins: str) -> str:
        """How many pairs chose each expert, which is what the blocks of others before its own depend on."""
        counts = self.base.names.fresh("counts")
        self.base.line(f"{counts} = tl.zeros([{self.bins}], tl.int32)")
        scope, _, chosen = self._walk()
        scope.line(f"{counts} += tl.histogram({chosen}, {self.bins})")
        self.base.close(scope)
        return self.base.bind(f"tl.where({bins} < {self.experts}, {counts}, 0)", "counts")

    def _place(self, first: str) -> str:
        """Store the pairs of this program's expert, and give the place behind the last one."""
        place = self.base.names.fresh("place")
        self.base.line(f"{place} = {first} * {self.block}")
        scope, pair, chosen = self._walk()
        mine = scope.bind(f"{chosen} == {self.expert}", "mine")
        one = scope.bind(f"{mine}.to(tl.int32)", "one")
        at = scope.bind(f"{place} + tl.cumsum({one}, axis=0) - 1", "at")
        scope.line(f"tl.store({self._name(self.order)} + {at}, {pair}, mask={mine})")
        scope.line(f"{place} += tl.sum({one}, axis=0)")
        self.base.close(scope)
        return place

    def _walk(self) -> tuple[Scope, str, str]:
        """An open loop over all pairs, with blocks of their numbers and of the experts that they chose."""
        extent = print_index(self.pairs)
        scope = self.base.open(f"for start in range(0, {extent}, {self.lanes}):")
        pair = scope.bind(f"start + tl.arange(0, {self.lanes})", "pair")
        ok = scope.bind(f"{pair} < {extent}", "pair_ok")
        known = self.context.extended({}, {PAIR: Block(pair, ok, scope, self.pairs)})
        index = reshape_map(self.ids.shape, (self.pairs,)).exprs
        chosen = known.load(Load(self.ids.dtype, self.ids, index), convert=False).text
        return scope, pair, scope.bind(f"tl.where({ok}, {chosen}, {self.nobody}).to(tl.int32)", "chosen")

    def _fill(self, pointer: str, low: str, high: str, value: str) -> None:
        """Store ``value`` at the places [low, high)."""
        scope = self.base.open(f"for start in range({low}, {high}, {self.lanes}):")
        at = scope.bind(f"start + tl.arange(0, {self.lanes})", "at")
        scope.line(f"tl.store({pointer} + {at}, {value}, mask={at} < {high})")
        self.base.close(scope)

    def _name(self, value: Value) -> str:
        return self.context.pointers.names[value]
