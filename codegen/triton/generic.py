"""The general form: any segment as nested loops, one point of the iteration space per lane.

Reductions and dot products become scalar loops around blocks of points, nested as deep as they come. It is right for
everything that has a loop form, and fast for nothing; segments that deserve speed match another template.
"""

from __future__ import annotations

from sympy import Expr

from tilewright.ir.index import sym
from tilewright.ir.loops import Dot, Reduce, Segment, free_symbols
from tilewright.ir.types import DType

from .expression import Block, Context, Operand
from .pointwise import emit_pointwise
from .pointwise_ops import TRITON_TYPES, compute_dtype
from .row_loops import combine, identity
from .text import Scope, deepest, print_index
from .tiling import Tile


class _LoopContext(Context):
    """A context that computes a reduction where its operands are known, by a loop over scalars."""

    def reduction(self, node: Reduce | Dot) -> Operand:
        axes = node.axes if isinstance(node, Reduce) else (node.axis,)
        kind = node.kind if isinstance(node, Reduce) else "sum"
        dtype = DType.i32 if node.dtype is DType.bool else compute_dtype(node.dtype)
        symbols = {s for a in free_symbols(node) for s in self._symbols(a)}
        outer = deepest([self.base, *(self.blocks[s].scope for s in symbols)])
        name = outer.names.fresh(kind)
        # Every lane has its own sum, even where the operands vary with fewer lanes: the shape is that of the points.
        outer.line(f"{name} = tl.full({self._shape()}, {identity(kind, node.dtype)}, {TRITON_TYPES[dtype]})")
        opened: list[tuple[Scope, Scope]] = []
        scope, context = outer, self
        for axis in axes:
            index = outer.names.fresh(axis.symbol.name)
            child = scope.open(f"for {index} in range(0, {print_index(axis.extent)}):")
            opened.append((scope, child))
            scope = child
            symbol = sym(f"loop_{index}")
            context = context.extended({axis.symbol: symbol}, {symbol: Block(index, "", scope, axis.extent)})
        scope.line(f"{name} = {combine(kind, name, self._term(node, context, dtype))}")
        for parent, child in reversed(opened):
            parent.close(child)
        text = outer.bind(f"{name} != 0") if node.dtype is DType.bool else name
        return Operand(text, outer)

    def _term(self, node: Reduce | Dot, context: Context, dtype: DType) -> str:
        if isinstance(node, Reduce):
            text = context.named(node.body).text
            return f"tl.cast({text}, {TRITON_TYPES[dtype]})" if node.dtype is DType.bool else text
        a, b = (context.operand(n, node.a.dtype).text for n in (node.a, node.b))
        return f"{a}.to({TRITON_TYPES[dtype]}) * {b}.to({TRITON_TYPES[dtype]})"

    def _shape(self) -> str:
        return "[BLOCK_N]" if any(not s.name.startswith("loop_") for s in self.blocks) else "[]"


def emit_generic(segment: Segment, tile: Tile, context: Context, pid: str) -> Expr:
    """Emit the segment into ``context.base``. Returns the number of programs."""
    lanes = _LoopContext(context.base, context.pointers, context.axes, context.blocks, context.shared)
    return emit_pointwise(segment, tile, lanes, pid)
