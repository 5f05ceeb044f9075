"""Matrix products with a prologue on the row operand and an epilogue on the accumulators.

One accumulator per Dot of the segment: RoPE's pairs and a gate beside its up-projection read other rows of the weight
with the same tile of ``a``. With rows, a program computes a BLOCK_M x BLOCK_N tile with ``tl.dot``; without (decode at
batch 1) it sums BLOCK_N x BLOCK_K products, as a matrix-vector product gains nothing from tensor cores. Axes that both
operands share (a batched product) are spread over the programs.

With few rows the tile may be transposed (``Tile.transposed``), columns x rows: Hopper's tensor cores (wgmma) multiply
64 rows of the left operand at least, but 8 or more columns of the right one, so that a batch of 16 would fill a quarter
of a tile on the left, and on the right all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from sympy import Expr

from tilewright.ir.index import sym
from tilewright.ir.loops import Axis, Dot, Load, MatmulForm, Segment, free_symbols, matmul_form
from tilewright.ir.types import DType

from .dependence import LINE, request, wait_for_predecessor
from .expression import Block, Context, Operand, flatten
from .pointwise_ops import TRITON_TYPES, compute_dtype
from .row_loops import K, KBlock, RowLoop, Stage, below, plan_stages, reductions
from .text import Scope, ceil_div, print_index
from .tiling import Tile

M, N, Z = sym("m"), sym("n"), sym("z")


@dataclass(frozen=True)
class Product:
    """A segment as a product: rows, columns, the axes of a batch, and the loops it takes."""

    form: MatmulForm
    batch: tuple[Axis, ...]
    stages: tuple[Stage, ...]


def find_product(segment: Segment) -> Product | None:
    """The segment as a product that this template can print, or None."""
    plain = matmul_form(segment)
    form, batch = _batched_form(segment) if plain is None else (plain, ())
    if form is None or form.a.dtype is DType.f64:
        return None
    if any(reductions(below(d.b)) for d in form.dots):
        return None
    stages = plan_stages(segment, frozenset(a.symbol for a in (*form.rows, *batch)), form.dots)
    return None if stages is None else Product(form, batch, stages)


def _batched_form(segment: Segment) -> tuple[MatmulForm | None, tuple[Axis, ...]]:
    """The form of a product whose operands share axes, and those axes."""
    dots = tuple(n for n in segment.nodes() if isinstance(n, Dot))
    if not dots or any(d.a is not dots[0].a or d.axis != dots[0].axis for d in dots):
        return None, ()
    if any(isinstance(n, Dot) for d in dots for part in d.children for n in below(part)):
        return None, ()
    k = dots[0].axis
    left = free_symbols(dots[0].a) - {k.symbol}
    right = frozenset().union(*(free_symbols(d.b) for d in dots)) - {k.symbol}
    if left | right != {a.symbol for a in segment.axes}:
        return None, ()
    rows = tuple(a for a in segment.axes if a.symbol in left - right)
    columns = tuple(a for a in segment.axes if a.symbol in right - left)
    return MatmulForm(rows, columns, k, dots[0].a, dots), tuple(
        a for a in segment.axes if a.symbol in left & right
    )


def emit_matmul(
    product: Product, segment: Segment, tile: Tile, context: Context, pid: str, interpret: bool
) -> Expr:
    """Emit the segment into ``context.base``; ``context`` has no axes yet. Returns the number of programs."""
    kind = _TilePrinter if product.form.rows else _VectorPrinter
    return kind(product, segment, tile, context, interpret).emit(pid)


def _range(scope: Scope, name: str, start: str, constant: str, size: int, extent: Expr, shape: str) -> Block:
    """A block of indices from ``start``; masked unless ``size`` divides the extent."""
    text = f"{start} * {constant} + tl.arange(0, {constant})" if start else f"tl.arange(0, {constant})"
    text = scope.bind(f"({text}){shape}" if shape and start else f"{text}{shape}", name)
    even = extent.is_Integer and int(extent) % size == 0
    mask = "" if even else scope.bind(f"{text} < {print_index(extent)}", f"{text}_ok")
    return Block(text, mask, scope, extent)


class _Printer:
    """What both forms share: constants, contexts of the row operand and of the result, and the stages."""

    def __init__(
        self, product: Product, segment: Segment, tile: Tile, context: Context, interpret: bool
    ) -> None:
        self.form, self.stages, self.segment, self.interpret = (
            product.form,
            product.stages,
            segment,
            interpret,
        )
        self.tile, self.context, self.base = tile, context, context.base
        self.operand = self.form.a.dtype
        self.accumulator = TRITON_TYPES[compute_dtype(self.operand)]
        self.row_axes, self.rows = flatten(self.form.rows, M)
        self.column_axes, self.columns = flatten(self.form.columns, N)
        self.batch_axes, self.batch = flatten(product.batch, Z)
        self.block_n = self.base.constant("BLOCK_N", tile.block_n)
        self.block_k = self.base.constant("BLOCK_K", tile.block_k)

    def split_batch(self, pid: str, tiles: Expr) -> str:
        """Bind the batch axes to this program's number; gives the number of its tile."""
        if self.batch == 1:
            return pid
        count = self.base.bind(print_index(tiles), "tiles")
        block = Block(self.base.bind(f"{pid} // {count}", "z"), "", self.base, self.batch)
        self.context = self.context.extended(self.batch_axes, {Z: block})
        return self.base.bind(f"{pid} % {count}", "tile")

    def begin(self, column: Context, subscript: str) -> None:
        """Before anything that another kernel wrote: where the kernel may start early, request the first block of each
        weight, then wait. ``column`` knows the columns; ``subscript`` shapes a block along K."""
        if not self.tile.dependent:
            return
        for dot in self.form.dots:
            loads = [n for n in below(dot.b) if isinstance(n, Load) and not n.indirect]
            weights = [n for n in loads if n.value in self.context.pointers.constants]
            if weights:
                self._request(max(weights, key=_size), column, subscript)
        wait_for_predecessor(self.base)

    def _request(self, weight: Load, column: Context, subscript: str) -> None:
        step = LINE // weight.dtype.itemsize
        lines = max(1, self.tile.block_k // step)
        text = self.base.bind(f"(tl.arange(0, {lines}) * {step}){subscript}", "line")
        extent = self.form.k.extent
        even = extent.is_Integer and int(extent) % (lines * step) == 0
        mask = "" if even else self.base.bind(f"{text} < {print_index(extent)}", f"{text}_ok")
        block = Block(text, mask, self.base, extent)
        address, mask, scope = column.extended({self.form.k.symbol: K}, {K: block}).address(weight)
        if mask:
            base = self.context.pointers.names[weight.value]
            address = f"tl.where({mask}, {address}, {base})"
        request(scope, address)

    def accumulators(self, shape: str) -> dict[Dot, str]:
        """Zeroed accumulators, one per distinct product."""
        names = {}
        for dot in self.form.dots:
            names[dot] = self.base.names.fresh("acc")
            self.base.line(f"{names[dot]} = tl.zeros({shape}, {self.accumulator})")
        return names

    def row_operand(self, scope: Scope, row: Context, lanes: Sequence[sympy.Symbol], shape: str) -> Operand:
        """The a tile, rounded to the operand dtype and zero beyond K."""
        a = self.form.a
        value = row.shaped(row.operand(a, self.operand), a, lanes, shape, "a")
        mask = row.blocks[K].mask
        if not mask or (isinstance(a, Load) and K in row.varies(a)):
            return value
        return Operand(
            scope.bind(f"tl.where({mask}, {value.text}, 0.0).to({TRITON_TYPES[self.operand]})", "a"), scope
        )

    def store(self, epilogue: Context, *lanes: sympy.Symbol) -> None:
        for store in self.segment.stores:
            epilogue.store(store, self.base, lanes)


class _TilePrinter(_Printer):
    """Tiles of rows x columns, or transposed; :meth:`_across` gives the shape of whatever has two axes."""

    def emit(self, pid: str) -> Expr:
        base, tile = self.base, self.tile
        self.block_m = base.constant("BLOCK_M", tile.block_m)
        lanes = ("[None, :]", "[:, None]") if tile.transposed else ("[:, None]", "[None, :]")
        self.row_lanes, self.column_lanes = lanes
        tiles_m, tiles_n = ceil_div(self.rows, tile.block_m), ceil_div(self.columns, tile.block_n)
        pid_m, pid_n = "", self.split_batch(pid, tiles_m * tiles_n)
        if tiles_m != 1:
            count = base.bind(print_index(tiles_m), "tiles_m")
            pid_m, pid_n = base.bind(f"{pid_n} % {count}", "pid_m"), base.bind(f"{pid_n} // {count}", "pid_n")
        m = _range(base, "m", pid_m, self.block_m, tile.block_m, self.rows, self.row_lanes)
        self.n = _range(base, "n", pid_n, self.block_n, tile.block_n, self.columns, self.column_lanes)
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
        for stage in self.stages:
            self._stage(stage, loop, context)
        self.store(context.extended(self.column_axes, {N: self.n}), M, N)
        return tiles_m * tiles_n * self.batch

    def _across(self, first: str, second: str) -> str:
        """The shape of a block of rows x columns (or of either and k), in the order of the tile."""
        return f"[{second}, {first}]" if self.tile.transposed else f"[{first}, {second}]"

    def _stage(self, stage: Stage, loop: RowLoop, context: Context) -> None:
        k = KBlock(self.block_k, self.tile.block_k, stage.extent)
        names = self.accumulators(self._across(self.block_m, self.block_n)) if stage.dots else {}

        def body(scope: Scope, start: str) -> Context:
            row = context.extended({self.form.k.symbol: K}, {K: k.index(scope, start, self.column_lanes)})
            if names:
                self._multiply(scope, row, k.index(scope, start, self.row_lanes, "kb"), names)
            return row

        loop.run(stage, k, body, context)
        context.bound.update({dot: Operand(name, self.base) for dot, name in names.items()})

    def _multiply(self, scope: Scope, row: Context, down: Block, names: dict[Dot, str]) -> None:
        column = self.context.extended({**self.column_axes, self.form.k.symbol: K}, {N: self.n, K: down})
        a = self.row_operand(scope, row, (M, K), self._across(self.block_m, self.block_k)).text
        for dot, name in names.items():
            b = column.operand(dot.b, self.operand)
            b = column.shaped(b, dot.b, (K, N), self._across(self.block_k, self.block_n), "b")
            scope.line(f"{name} = {self._dot(a, b.text, name)}")

    def _dot(self, a: str, b: str, name: str) -> str:
        left, right = (b, a) if self.tile.transposed else (a, b)
        # The interpreter keeps bfloat16 as raw bits and would multiply those; a float32 product is the same number.
        widened = self.interpret and self.operand is DType.bf16
        if widened:
            left, right = f"{left}.to(tl.float32)", f"{right}.to(tl.float32)"
        precise = ', input_precision="ieee"' if widened or self.operand is DType.f32 else ""
        return f"tl.dot({left}, {right}, {name}{precise})"


class _VectorPrinter(_Printer):
    def emit(self, pid: str) -> Expr:
        base, tiles = self.base, ceil_div(self.columns, self.tile.block_n)
        pid = self.split_batch(pid, tiles)
        n = _range(base, "n", pid, self.block_n, self.tile.block_n, self.columns, "")
        mask = base.bind(f"{n.mask}[:, None]", "nb_ok") if n.mask else ""
        self.down = Block(base.bind(f"{n.text}[:, None]", "nb"), mask, base, self.columns)
        self.begin(self.context.extended(self.column_axes, {N: self.down}), "[None, :]")
        loop = RowLoop(base, f"[{self.block_k}]", 0, False, "[]", wide=True)
        for stage in self.stages:
            self._stage(stage, loop)
        self.store(self.context.extended(self.column_axes, {N: n}), N)
        return tiles * self.batch

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
            b = column.operand(dot.b, self.operand)
            b = column.shaped(b, dot.b, (N, K), f"[{self.block_n}, {self.block_k}]", "b")
            product = f"{a} * {b.text}.to({self.accumulator})"
            if dot in names:
                scope.line(f"{names[dot]} += {product}")
            products[dot] = names[dot] if dot in names else scope.bind(product, "product")
        return products


def _size(weight: Load) -> int:
    numel = weight.value.type.numel
    return int(numel) if numel.is_Integer else 0
