"""Weights that are stored as codes with a scale per group of columns, as both templates for products read them.

They are walked group by group, in blocks of [rows of the weight, groups, places], so that a scale is loaded once.
Where two columns share a byte (int4), a sum over k becomes two sums over bytes j,

    sum over k of a[k] * w[k]  =  sum over halves h, bytes j of a[k(j, h)] * w[k(j, h)],   k = 8 (j // 4) + 4 h + j % 4

in which both halves read the same byte: codes are loaded once, in whole vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Expr, Integer, Symbol

from tilewright.ir.index import FloorDiv, Mod, sym
from tilewright.ir.loops import Load, MatmulForm

from .expression import Block
from .row_loops import K, below
from .text import Scope, print_index

GROUP, PLACE = sym("group"), sym("place")
"""Block symbols: a group of columns, and a byte in it."""


@dataclass(frozen=True)
class Codes:
    """Weights in groups of ``group`` columns that share a scale, ``halves`` columns to a byte."""

    group: int
    halves: int

    @property
    def places(self) -> int:
        """Bytes of a group."""
        return self.group // self.halves

    def column(self, half: int) -> Expr:
        """Column k at a GROUP and a PLACE in it."""
        return self.group * GROUP + self._within(PLACE, half)

    def column_of_byte(self, half: int) -> Expr:
        """Column k at a byte K of the row."""
        return self._within(K, half)

    def _within(self, byte: Symbol, half: int) -> Expr:
        if self.halves == 1:
            return byte
        return 8 * FloorDiv(byte, Integer(4)) + 4 * half + Mod(byte, Integer(4))


def stored_codes(form: MatmulForm) -> Codes | None:
    """How the weights of a product are stored, when they are codes with a scale per group of columns."""
    k = form.k.symbol
    loads = [n for d in form.dots for n in below(d.b) if isinstance(n, Load) and not n.indirect]
    indices = [e for load in loads for e in load.index if k in e.free_symbols]
    packed = any({FloorDiv(k, Integer(8)), Mod(k, Integer(4))} <= e.atoms(FloorDiv, Mod) for e in indices)
    groups = {
        int(d.args[1])
        for e in indices
        if not e.atoms(Mod)
        for d in e.atoms(FloorDiv)
        if d.args[0] == k and d.args[1].is_Integer
    }
    extent = form.k.extent
    if not groups or not extent.is_Integer:
        return None
    group = max(groups)
    if group & (group - 1) or group % 8 or int(extent) % group:
        return None
    return Codes(group, 2 if packed else 1)


@dataclass(frozen=True)
class GroupLoop:
    """A loop over groups, opened: its body, the blocks of a group and a place, and the names of their sizes.

    size: groups per iteration.
    """

    scope: Scope
    blocks: dict[Symbol, Block]
    size: int
    block_g: str
    places: str

    @staticmethod
    def begin(base: Scope, codes: Codes, extent: Expr, columns: int) -> GroupLoop:
        """Open a loop over ``extent`` columns, about ``columns`` of them per iteration."""
        size = max(1, columns // codes.group)
        groups = FloorDiv(extent, Integer(codes.group))
        block_g, places = base.constant("BLOCK_G", size), base.constant("PLACES", codes.places)
        place = base.bind(f"tl.arange(0, {places})[None, None, :]", "place")
        scope = base.open(f"for start in range(0, {print_index(groups)}, {block_g}):")
        g = scope.bind(f"(start + tl.arange(0, {block_g}))[None, :, None]", "g")
        even = groups.is_Integer and int(groups) % size == 0
        mask = "" if even else scope.bind(f"{g} < {print_index(groups)}", "g_ok")
        blocks = {GROUP: Block(g, mask, scope, groups), PLACE: Block(place, "", base, Integer(codes.places))}
        return GroupLoop(scope, blocks, size, block_g, places)

    def shape(self, first: str) -> str:
        """The shape of a block of ``first`` columns of the result."""
        return f"[{first}, {self.block_g}, {self.places}]"
