"""Products of several rows: tiles of rows x columns on tensor cores, with a prologue on the row operand and an
epilogue on the accumulators.

One accumulator per Dot of the segment: RoPE's pairs and a gate beside its up-projection read other rows of the weight
with the same tile of ``a``. Axes that both operands share (a batched product) are spread over the programs.

With few rows the tile may be transposed (``Tile.transposed``), columns x rows: Hopper's tensor cores (wgmma) multiply
64 rows of the left operand at least, but 8 or more columns of the right one, so that a batch of 16 would fill a quarter
of a tile on the left, and on the right all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
from sympy import Expr, Symbol

from tilewright.ir.index import linear_index
from tilewright.ir.loops import Apply, Dot, Node, Segment
from tilewright.ir.types import DType

from .code_sums import code_sums
from .codes import GROUP, PLACE, Codes, GroupLoop, Weight, stored_codes, weight_of, whole_weight
from .descriptors import LARGEST, advances_by_one, descriptor_of, matrix_load
from .expression import Block, Context, Operand
from .integer_tiles import integer_tiles
from .matvec import VectorPrinter
from .pointwise_ops import TRITON_TYPES
from .product import M, N, Product, ProductPrinter, index_range, multiply_add
from .row_loops import K, KBlock, RowLoop, Stage
from .text import Scope, ceil_div, print_index
from .tiling import Tile


def emit_matmul(
    product: Product, segment: Segment, tile: Tile, context: Context, pid: str, interpret: bool
) -> Expr:
    """Emit the segment into ``context.base``; ``context`` has no axes yet. Returns the number of programs."""
    kind = _TilePrinter if product.form.rows else VectorPrinter
    return kind(product, segment, tile, context, interpret).emit(pid)


@dataclass(frozen=True)
class _Side:
    """The rows or the columns of a product: what their axes are, the number of a program's tile ("" for the only one),
    and the name and size of its block."""

    axes: dict[Symbol, Expr]
    tile: str
    block: str
    size: int
    extent: Expr

    def first(self, scope: Scope) -> Block:
        """The first index of the block."""
        return Block(f"({self.tile} * {self.block})" if self.tile else "0", "", scope, self.extent)


class _TilePrinter(ProductPrinter):
    """Tiles of rows x columns, or transposed; :meth:`_across` gives the shape of whatever has two axes."""

    def emit(self, pid: str) -> Expr:
        base, tile = self.base, self.tile
        self.block_m = base.constant("BLOCK_M", tile.block_m)
        lanes = ("[None, :]", "[:, None]") if tile.transposed else ("[:, None]", "[None, :]")
        self.row_lanes, self.column_lanes = lanes
        tiles_m, tiles_n = ceil_div(self.rows, tile.block_m), ceil_div(self.columns, tile.block_n)
        pid_m, pid_n = self._place(self.split_batch(pid, tiles_m * tiles_n), tiles_m, tiles_n)
        self.sides = {
            M: _Side(self.row_axes, pid_m, self.block_m, tile.block_m, self.rows),
            N: _Side(self.column_axes, pid_n, self.block_n, tile.block_n, self.columns),
        }
        m = index_range(base, "m", pid_m, self.block_m, tile.block_m, self.rows, self.row_lanes)
        self.n = index_range(base, "n", pid_n, self.block_n, tile.block_n, self.columns, self.column_lanes)
        self.begin(self.context.extended(self.column_axes, {N: self.n}), self.row_lanes)
        context = self.context.extended(self.row_axes, {M: m})
        loop = RowLoop(
            base,
            self._across(self.block_m, self.block_k),
            0 if tile.transposed else 1,
            True,
            self._across(self.block_m, "1"),
            wide=False,
        )
        sums, codes, bytes_ = code_sums(self), stored_codes(self.form), integer_tiles(self)
        for stage in self.stages:
            if not stage.dots or (sums is None and codes is None and bytes_ is None):
                self._stage(stage, loop, context)
                continue
            if stage.reduces:
                self._stage(replace(stage, dots=()), loop, context)
            if sums is not None:
                sums.emit(pid_n, self.n)
            elif bytes_ is not None:
                first = f"{pid_m} * {self.block_m} + " if pid_m else ""
                found = bytes_.emit(m, self.n, first)
                context.bound.update({dot: self._scaled(dot, name) for dot, name in found.items()})
            elif codes is not None:
                self._multiply_codes(codes, context, pid_n)
        self.store(context.extended(self.column_axes, {N: self.n}), M, N)
        return tiles_m * tiles_n * self.batch

    def _place(self, number: str, tiles_m: Expr, tiles_n: Expr) -> tuple[str, str]:
        """The row ("" for the only one) and the column of a tile. Tiles of one column are neighbours in time: one of
        them brings the weights to the second-level cache for all. In groups, rows are there still for the next column.
        """
        base, group = self.base, self.tile.group
        if tiles_m == 1:
            return "", number
        count = base.bind(print_index(tiles_m), "tiles_m")
        first = ""
        if group and not (tiles_m.is_Integer and int(tiles_m) <= group):
            size = base.bind(print_index(group * tiles_n), "in_group")
            first = base.bind(f"{number} // {size} * {group}", "first")
            count = base.bind(f"tl.minimum({count} - {first}, {group})", "height")
            number = base.bind(f"{number} % {size}", "within")
        pid_m = f"{first} + {number} % {count}" if first else f"{number} % {count}"
        return base.bind(pid_m, "pid_m"), base.bind(f"{number} // {count}", "pid_n")

    def _across(self, first: str, second: str) -> str:
        """The shape of a block of rows x columns (or of either and k), in the order of the tile."""
        return f"[{second}, {first}]" if self.tile.transposed else f"[{first}, {second}]"

    def _stage(self, stage: Stage, loop: RowLoop, context: Context) -> None:
        k = KBlock(self.block_k, self.tile.block_k, stage.extent)
        names = self.accumulators(self._across(self.block_m, self.block_n)) if stage.dots else {}

        def body(scope: Scope, start: str) -> Context:
            row = context.extended({self.form.k.symbol: K}, {K: k.index(scope, start, self.column_lanes)})
            if names:
                # Reductions of the row need it in registers; a load by address then serves both.
                a = "" if stage.reduces else self._copied(self.form.a, M, scope, k, start)
                a = a or self.row_operand(scope, row, (M, K), self._across(self.block_m, self.block_k)).text
                for dot, name in names.items():
                    b = self._copied(dot.b, N, scope, k, start) or self._factor(dot, scope, k, start)
                    scope.line(f"{name} = {self._dot(a, b, name)}")
            return row

        loop.run(stage, k, body, context)
        context.bound.update({dot: self._scaled(dot, name) for dot, name in names.items()})

    def _scaled_once(self, dot: Dot) -> Weight | None:
        """The weight of a product whose sums may have its only factor: every operand dtype holds a byte exactly."""
        weight = weight_of(dot.b)
        small = weight is not None and weight.code.dtype.itemsize == 1
        return weight if weight and small and weight.is_scaled_once(self.form.k.symbol) else None

    def _scaled(self, dot: Dot, name: str) -> Operand:
        """The sum of a product, with the factor that it has yet to get."""
        weight = self._scaled_once(dot)
        if weight is None:
            return Operand(name, self.base)
        scale = self.context.extended(self.column_axes, {N: self.n}).named(weight.scale)
        return Operand(self.base.bind(f"{name} * {scale.text}", "dot"), self.base)

    def _factor(self, dot: Dot, scope: Scope, k: KBlock, start: str) -> str:
        """The b tile, computed or loaded by address."""
        blocks = {N: self.n, K: k.index(scope, start, self.row_lanes, "kb")}
        column = self.context.extended({**self.column_axes, self.form.k.symbol: K}, blocks)
        weight = self._scaled_once(dot)
        factor = dot.b if weight is None else Apply(DType.f32, "cast", (weight.code,))
        b = column.operand(factor, self.operand)
        return column.shaped(b, dot.b, (K, N), self._across(self.block_k, self.block_n), "b").text

    def _copied(self, factor: Node, lane: Symbol, scope: Scope, k: KBlock, start: str) -> str:
        """The tile of a factor as TMA copies it, or "" where it cannot. Rows beyond the last only reach results that
        are not stored; columns beyond the last must be zero, which they are where they lie outside the matrix."""
        load, side = matrix_load(factor, self.form.k.symbol), self.sides[lane]
        if not self.tile.descriptors or load is None or load.dtype is not self.operand:
            return ""
        if max(side.size, k.size) > LARGEST or load in self.context.bound:
            return ""
        pointers, column = self.context.pointers, load.index[-1]
        matrix = descriptor_of(
            load.value, pointers.shape(load.value), pointers.names[load.value], (side.size, k.size)
        )
        if not k.even and (column, k.extent) != (self.form.k.symbol, matrix.columns):
            return ""
        corner = self.context.extended(
            {**side.axes, self.form.k.symbol: K},
            {lane: side.first(self.base), K: Block(start or "0", "", scope, k.extent)},
        )
        row = corner.over_blocks(linear_index(load.index[:-1], pointers.shape(load.value)[:-1]))
        extents = {s: b.extent for s, b in corner.blocks.items()}
        if lane in corner.over_blocks(column).free_symbols or not advances_by_one(
            row, lane, side.size, extents
        ):
            return ""
        pointers.descriptors[matrix.name] = matrix
        place = f"{corner.index(row)[0]}, {corner.index(column)[0]}"
        block = scope.bind(f"{matrix.name}.load([{place}])", matrix.pointer.removeprefix("p_"))
        # Both factors lie in memory with their rows outside; the right one of a product has k there.
        return block if self.tile.transposed == (lane is N) else scope.bind(f"tl.trans({block})", block)

    def _multiply_codes(self, codes: Codes, context: Context, pid_n: str) -> None:
        """The dots, group by group of the columns that share a scale; each half of the bytes is its own product."""
        base, block_n = self.base, self.block_n
        n = index_range(base, "nc", pid_n, block_n, self.tile.block_n, self.columns, "[:, None, None]")
        names = self.accumulators(self._across(self.block_m, block_n))
        groups = GroupLoop.begin(base, codes, self.form.k.extent, self.tile.block_k)
        scope, shape = groups.scope, groups.shape(block_n)
        block_j = base.constant("BLOCK_J", groups.size * codes.places)
        j = scope.bind(f"(start * {groups.places} + tl.arange(0, {block_j})){self.column_lanes}", "j")
        extent = sympy.expand(self.form.k.extent / codes.halves)
        mask = scope.bind(f"{j} < {print_index(extent)}", "j_ok") if groups.blocks[GROUP].mask else ""
        for half in range(codes.halves):
            k = self.form.k.symbol
            row = context.extended({k: codes.column_of_byte(half)}, {K: Block(j, mask, scope, extent)})
            a = self.row_operand(scope, row, (M, K), self._across(self.block_m, block_j)).text
            column = self.context.extended(
                {**self.column_axes, k: codes.column(half)}, {**groups.blocks, N: n}
            )
            for dot, name in names.items():
                b = column.shaped(self._weight(column, dot.b), dot.b, (N, GROUP, PLACE), shape, "b")
                flat = f"tl.reshape({b.text}, [{block_n}, {block_j}])"
                b_tile = scope.bind(flat if self.tile.transposed else f"tl.trans({flat})", "b_tile")
                scope.line(f"{name} = {self._dot(a, b_tile, name)}")
        base.close(scope)
        context.bound.update({dot: Operand(name, base) for dot, name in names.items()})

    def _weight(self, column: Context, b: Node) -> Operand:
        """A right operand that is made of codes, rounded as it is multiplied."""
        weight, scope = weight_of(b), column.blocks[GROUP].scope
        if weight is None:
            return column.operand(b, self.operand)
        value = whole_weight(column, weight, self.operand)
        return Operand(scope.bind(f"{value}.to({TRITON_TYPES[self.operand]})", "b"), scope)

    def _dot(self, a: str, b: str, name: str) -> str:
        left, right = (b, a) if self.tile.transposed else (a, b)
        return multiply_add(left, right, name, self.operand, self.interpret)
