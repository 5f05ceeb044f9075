"""Elementwise segments: the iteration space flattened, one block of it per program."""

from __future__ import annotations

from sympy import Expr

from tilewright.ir.index import sym
from tilewright.ir.loops import Segment

from .expression import Block, Context, flatten
from .text import ceil_div, print_index
from .tiling import Tile

X = sym("x")


def emit_pointwise(segment: Segment, tile: Tile, context: Context, pid: str) -> Expr:
    """Emit the segment into ``context.base``. Returns the number of programs."""
    base = context.base
    axes, extent = flatten(segment.axes, X)
    blocks = {}
    if segment.axes:
        block_n = base.constant("BLOCK_N", tile.block_n)
        name = base.bind(f"{pid} * {block_n} + tl.arange(0, {block_n})", "x")
        even = extent.is_Integer and int(extent) % tile.block_n == 0
        mask = "" if even else base.bind(f"{name} < {print_index(extent)}", "ok")
        blocks[X] = Block(name, mask, base, extent)
    inner = context.extended(axes, blocks)
    for store in segment.stores:
        inner.store(store, base, blocks)
    return ceil_div(extent, tile.block_n)
