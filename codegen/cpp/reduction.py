"""Reductions that keep the innermost loop's index: columns side by side, vectorised across them.

    out[x] = f(sum(k: a[k, x]))   =>   for 64 columns: r[j] = 0;  for k: for j: r[j] += a[k, x + j];  out = f(r[j])

A reduction along a contiguous axis is left to ``Scalars``, which vectorises along that axis.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.ir.loops import Axis, Dot, Load, Node, Reduce, Segment, free_symbols

from .ctypes_of import scalar
from .expression import combine, initial
from .kernel_context import KernelContext, coefficient
from .scalars import Scalars, for_header, nested, parts

COLUMNS = 64


def column_reductions(segment: Segment, kernel: KernelContext) -> list[Reduce | Dot] | None:
    """The reductions of a segment to compute column by column, in order; None when one is to be done along its axis."""
    if not segment.axes:
        return []
    inner = segment.axes[-1]
    found = [n for n in segment.nodes() if isinstance(n, Reduce | Dot) and inner.symbol in free_symbols(n)]
    bound = {a.symbol for a in segment.axes}
    mine = [n for n in found if free_symbols(n) <= bound]  # others are computed inside of these
    if len(mine) != len(found) or any(_along_axis(n, inner, kernel, segment) for n in mine):
        return None
    return mine


def _along_axis(node: Reduce | Dot, inner: Axis, kernel: KernelContext, segment: Segment) -> bool:
    """Whether a tensor is contiguous along the reduced axis, but not across columns, and none the other way round."""
    axes, _, bodies = parts(node)
    ranges = {a.symbol: a.extent for a in (*segment.axes, *axes)}
    offsets = [kernel.offset(load.value, load.index, ranges) for b in bodies for load in _loads(b)]
    both = [(coefficient(o, axes[-1].symbol), coefficient(o, inner.symbol)) for o in offsets]
    return any(along == 1 and across not in (0, 1) for along, across in both) and not any(
        across == 1 and along not in (0, 1) for along, across in both
    )


def _loads(node: Node) -> list[Load]:
    found = [node] if isinstance(node, Load) else []
    return found + [n for c in node.children for n in _loads(c)]


def print_column_reduction(scalars: Scalars, node: Reduce | Dot, inner: Axis, first: str, count: str) -> None:
    """Compute ``node`` for the ``count`` columns from ``first`` on, into an array."""
    writer, (axes, kind, bodies) = scalars.writer, parts(node)
    array = writer.fresh("column")
    writer.line(f"{scalar(node.dtype)} {array}[{COLUMNS}];")
    writer.line(f"for (long j = 0; j < {count}; j++) {array}[j] = {initial(kind, node.dtype)};")

    def loops(left: Sequence[Axis]) -> None:
        scalars.hoist(bodies)
        if left:
            with writer.block(for_header(left[0])), scalars.scope([left[0]]):
                loops(left[1:])
            return
        if not any(nested(b, inner.symbol) for b in bodies):
            writer.pragma("omp simd")
        with writer.block(f"for (long j = 0; j < {count}; j++)"), scalars.scope([inner], simd=True):
            writer.line(f"const long {inner.symbol} = {first} + j;")
            value = " * ".join(scalars.text(b) for b in bodies)
            writer.line(f"{array}[j] = {combine(kind, node.dtype, f'{array}[j]', value)};")

    with writer.block(), scalars.scope():
        loops(axes)
    scalars.bind(node, f"{array}[j]")
