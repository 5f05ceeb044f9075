"""Cutting an index space into pieces, until every concat inside has one answer."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy import Expr, Integer

from ..errors import VerifyError
from ..index import Mod, sym
from ..module import Op
from ..types import Value
from .nodes import Axis


class NeedSplit(Exception):
    """The iteration space must be cut: ``symbol`` at ``at``, or tiled by ``tile`` first."""

    def __init__(self, symbol: sympy.Symbol, at: Expr | None = None, tile: Expr | None = None) -> None:
        super().__init__(symbol)
        self.symbol, self.at, self.tile = symbol, at, tile


def cut_for(
    at: Expr, parts: tuple[Expr, ...], number: int, ranges: dict[sympy.Symbol, Expr]
) -> NeedSplit | VerifyError:
    """How to cut the space so that index ``at`` of joined parts lies below the end of part ``number`` or not.

    parts: the extent of each. A VerifyError when there is no way, or when a piece might have less than no elements for
    some sizes, as of a slice that need not reach the end.
    """
    boundary = sympy.Add(*parts[: number + 1])
    symbols = [s for s in at.free_symbols if s in ranges]
    if len(symbols) == 1:
        symbol = symbols[0]
        if isinstance(at, Mod) and at.args[0] == symbol:
            return NeedSplit(symbol, tile=at.args[1])
        offset = sympy.expand(at - symbol)
        if not offset.free_symbols & set(ranges):
            cut = sympy.expand(boundary - offset)
            if _is_extent(cut, parts) and _is_extent(ranges[symbol] - cut, parts):
                return NeedSplit(symbol, at=cut)
    return VerifyError(f"cannot split an iteration space so that {at} < {boundary} is decided")


def _is_extent(expr: Expr, parts: tuple[Expr, ...]) -> bool:
    """Whether an expression is never negative, given that no part's extent is. (Of a dim such as ``S - 3`` that is
    known from its tensor alone.)"""
    given = [d for d in parts if not d.is_nonnegative]
    runs = ((low, high) for high in range(len(given) + 1) for low in range(max(high, 1)))
    return any(sympy.expand(expr - sympy.Add(*given[low:high])).is_nonnegative for low, high in runs)


@dataclass(frozen=True)
class Piece:
    """Part of a result's index space: ``index`` over ``axes``."""

    axes: tuple[Axis, ...]
    index: tuple[Expr, ...]

    def split(self, need: NeedSplit) -> tuple[Piece, ...]:
        old = next((a for a in self.axes if a.symbol == need.symbol), None)
        if old is None:
            raise VerifyError(f"cannot split the reduction axis {need.symbol} of a concat")
        if need.tile is not None:
            outer, inner = sym(old.symbol.name + "o"), sym(old.symbol.name + "i")
            if sympy.fraction(old.extent / need.tile)[1] != 1:
                raise VerifyError(f"extent {old.extent} is no multiple of {need.tile}")
            new: tuple[Axis, ...] = (Axis(outer, old.extent / need.tile), Axis(inner, need.tile))
            return (self._replace(old, new, need.tile * outer + inner),)
        assert need.at is not None
        low = self._replace(old, (Axis(old.symbol, need.at),), old.symbol)
        high = self._replace(
            old, (Axis(old.symbol, sympy.expand(old.extent - need.at)),), old.symbol + need.at
        )
        return low, high

    def _replace(self, old: Axis, new: tuple[Axis, ...], expr: Expr) -> Piece:
        axes = tuple(a for axis in self.axes for a in (new if axis == old else (axis,)))
        return Piece(axes, tuple(sympy.expand(e.xreplace({old.symbol: expr})) for e in self.index))

    def canonical(self) -> Piece:
        """Unit axes dropped, the others named x0, x1, ..."""
        table: dict[sympy.Symbol, Expr] = {}
        axes: list[Axis] = []
        for axis in self.axes:
            if axis.extent == 1:
                table[axis.symbol] = Integer(0)
            else:
                table[axis.symbol] = sym(f"x{len(axes)}")
                axes.append(Axis(sym(f"x{len(axes)}"), axis.extent))
        return Piece(tuple(axes), tuple(e.xreplace(table) for e in self.index))


def stored_space(result: Value, definitions: dict[Value, Op]) -> tuple[Value, Piece, tuple[Expr, ...]]:
    """The value whose elements are stored for ``result``, its whole space, and the shift of the stored index."""
    op = definitions.get(result)
    source, shift = result, tuple(Integer(0) for _ in result.shape)
    if op is not None and op.opcode == "append":
        source = op.operands[0]
        shift = (Integer(0), Integer(0), sym("T") - source.shape[2], Integer(0))
    axes = tuple(Axis(sym(f"a{n}"), extent) for n, extent in enumerate(source.shape))
    return source, Piece(axes, tuple(a.symbol for a in axes)), shift
