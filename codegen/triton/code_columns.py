"""Contexts in which sums of codes (see ``code_sums``) read what they multiply: elements of the row, and codes of
columns of the result that are neighbours in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from tilewright.ir.index import linear_index, simplify, sym
from tilewright.ir.loops import Apply, Load, Node
from tilewright.ir.types import DType

from .codes import PLACE
from .expression import Context, Operand
from .product import N
from .text import Scope, deepest


class Row(Context):
    """Vectors in bfloat16 are widened two elements at a time."""

    def load(self, node: Load, convert: bool) -> Operand:
        if not convert or node.dtype is not DType.bf16 or PLACE not in self.varies(node):
            return super().load(node, convert)
        value = super().load(node, convert=False)
        return Operand(value.scope.bind(f"widen({value.text})", value.text), value.scope)


@dataclass
class Neighbour(Context):
    """A column that is ``distance`` behind the ``first`` of a tile of ``width``. Where the way to it in memory is
    known, its addresses are the first's and a number, which costs no instruction."""

    first: Context | None = None
    distance: int = 0
    width: int = 1
    addresses: dict[Load, str] = field(default_factory=dict)
    """Variables of the first's addresses, shared by its neighbours."""

    def address(self, node: Load) -> tuple[str, str, Scope]:
        apart = self._apart(node)
        if apart is None or self.first is None:
            return super().address(node)
        text, _, scope = self.first.address(node)
        if node not in self.addresses:
            self.addresses[node] = scope.bind(text, "at")
        at = self.addresses[node]
        return f"{at} + {apart}" if apart else at, self._mask(node), scope

    def _apart(self, node: Load) -> int | None:
        """Elements from the first column's to this one's, if that is the same for all tiles."""
        if node.indirect:
            return None
        index = self.over_blocks(linear_index(node.index, self.pointers.shape(node.value)))
        tile, extents = sym("tile"), {s: b.extent for s, b in self.blocks.items()}
        extents |= {tile: sympy.ceiling(extents[N] / self.width)}
        places = [simplify(index.xreplace({N: self.width * tile + d}), extents) for d in (self.distance, 0)]
        apart = sympy.expand(places[0] - places[1])
        return int(apart) if apart.is_Integer else None


def product_of_pairs(row: Context, a: Node) -> Operand | None:
    """A product of two vectors in bfloat16, two elements at a time; None where ``a`` is something else."""
    match a:
        case Apply(
            dtype=DType.bf16, op="mul", args=(Load(dtype=DType.bf16) as x, Load(dtype=DType.bf16) as y)
        ):
            if x in row.bound or y in row.bound or not all(PLACE in row.varies(n) for n in (x, y)):
                return None
            left, right = row.load(x, convert=False), row.load(y, convert=False)
            scope = deepest((left.scope, right.scope))
            return Operand(scope.bind(f"multiply_pairs({left.text}, {right.text})", "a"), scope)
    return None
