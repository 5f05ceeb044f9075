"""Row reductions (norms, softmax, merges of partial results): BLOCK_M rows against the reduced axis.

A row that fits one block stays in registers: statistics and normalised result read it once. Longer rows are read in
loops, once per level of dependent reductions and once for the result.

Neighbouring rows may share a reduction: groups of a normalised vector, each of which is rounded by its own largest
element, have the vector's sum of squares in common. A tile of such rows computes it once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sympy
from sympy import Expr

from tilewright.ir.index import sym
from tilewright.ir.loops import Axis, Reduce, Segment, free_symbols
from tilewright.ir.types import next_power_of_two

from .expression import Block, Context, flatten
from .row_loops import K, KBlock, RowLoop, Stage
from .text import Scope, ceil_div, print_index
from .tiling import Tile

M = sym("m")


def row_symbols(segment: Segment) -> frozenset[sympy.Symbol]:
    """The axes that some reduction depends on."""
    found: frozenset[sympy.Symbol] = frozenset()
    own = {a.symbol for a in segment.axes}
    for node in segment.nodes():
        if isinstance(node, Reduce):
            found |= free_symbols(node) & own
    return found


def row_axes(segment: Segment) -> tuple[Axis, ...]:
    """The axes of the segment that tell its rows apart."""
    symbols = row_symbols(segment)
    return tuple(a for a in segment.axes if a.symbol in symbols)


def sharers(rows: Sequence[Axis], reduces: Iterable[Reduce]) -> int:
    """How many neighbouring rows share these reductions: those along the last axes, on which none of them depends."""
    used = {s for r in reduces for s in free_symbols(r)}
    last = max((n for n, axis in enumerate(rows) if axis.symbol in used), default=len(rows) - 1)
    count = sympy.prod([a.extent for a in rows[last + 1 :]], start=sympy.Integer(1))
    return int(count) if count.is_Integer else 1


def emit_reduction(
    segment: Segment, stages: tuple[Stage, ...], tile: Tile, context: Context, pid: str
) -> Expr:
    """Emit the segment into ``context.base``. Returns the number of programs."""
    base = context.base
    rows = row_axes(segment)
    columns = tuple(a for a in segment.axes if a not in rows)
    places, extent = flatten(rows, M)
    block_m = base.constant("BLOCK_M", tile.block_m)
    block_k = base.constant("BLOCK_K", tile.block_k)
    name = base.bind(f"({pid} * {block_m} + tl.arange(0, {block_m}))[:, None]", "m")
    even = extent.is_Integer and int(extent) % tile.block_m == 0
    mask = "" if even else base.bind(f"{name} < {print_index(extent)}", f"{name}_ok")
    context = context.extended(places, {M: Block(name, mask, base, extent)})
    for stage in stages:
        k, height, of_stage = _block(base, tile, stage.extent), block_m, context
        if tile.block_m > 1 and sharers(rows, stage.reduces) % tile.block_m == 0:
            first = Block(base.bind(f"{pid} * {block_m}", "first"), "", base, extent)
            height, of_stage = "1", context.extended({}, {M: first})

        def body(scope: Scope, start: str, k: KBlock = k, of_stage: Context = of_stage) -> Context:
            return of_stage.extended({}, {K: k.index(scope, start, "[None, :]")})

        loop = RowLoop(base, f"[{height}, {block_k}]", 1, True, f"[{height}, 1]", wide=True)
        loop.run(stage, k, body, context)
    _store(segment, columns, tile, context)
    return ceil_div(extent, tile.block_m)


def _block(base: Scope, tile: Tile, extent: Expr) -> KBlock:
    """The block of an axis: no longer than the axis, where that is known. (A row's groups are shorter than the row.)"""
    size = min(tile.block_k, next_power_of_two(int(extent))) if extent.is_Integer else tile.block_k
    return KBlock(base.constant("BLOCK_K", size), size, extent)


def _store(segment: Segment, columns: tuple[Axis, ...], tile: Tile, context: Context) -> None:
    """Store row results as [BLOCK_M, 1], others over blocks of the remaining axes."""
    base = context.base
    if not columns:
        for store in segment.stores:
            context.store(store, base, (M,))
        return
    axes, extent = flatten(columns, K)
    block = _block(base, tile, extent)
    scope = (
        base
        if block.whole
        else base.open(f"for start in range(0, {print_index(block.extent)}, {block.constant}):")
    )
    inner = context.extended(axes, {K: block.index(scope, "" if block.whole else "start", "[None, :]")})
    for store in segment.stores:
        inner.store(store, scope, (M, K))
    if not block.whole:
        base.close(scope)
