"""A segment as a matrix product, and what the templates for products share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from sympy import Expr

from tilewright.ir.index import sym
from tilewright.ir.loops import Dot, Load, MatmulForm, Segment, product_form
from tilewright.ir.types import DType

from .dependence import LINE, request, wait_for_predecessor
from .expression import Block, Context, Operand, flatten
from .pointwise_ops import TRITON_TYPES, compute_dtype
from .row_loops import K, Stage, below, plan_stages, reductions
from .text import Scope, print_index
from .tiling import Tile

M, N, Z = sym("m"), sym("n"), sym("z")


@dataclass(frozen=True)
class Product:
    """A segment as a product, and the loops it takes."""

    form: MatmulForm
    stages: tuple[Stage, ...]


def find_product(segment: Segment) -> Product | None:
    """The segment as a product that these templates can print, or None."""
    form = product_form(segment)
    if form is None or form.a.dtype is DType.f64:
        return None
    if any(reductions(below(d.b)) for d in form.dots):
        return None
    stages = plan_stages(segment, frozenset(a.symbol for a in (*form.rows, *form.batch)), form.dots)
    return None if stages is None else Product(form, stages)


def index_range(
    scope: Scope, name: str, start: str, constant: str, size: int, extent: Expr, shape: str
) -> Block:
    """A block of indices from ``start``; masked unless ``size`` divides the extent."""
    text = f"{start} * {constant} + tl.arange(0, {constant})" if start else f"tl.arange(0, {constant})"
    text = scope.bind(f"({text}){shape}" if shape and start else f"{text}{shape}", name)
    even = extent.is_Integer and int(extent) % size == 0
    mask = "" if even else scope.bind(f"{text} < {print_index(extent)}", f"{text}_ok")
    return Block(text, mask, scope, extent)


def multiply_add(left: str, right: str, total: str, operand: DType, interpret: bool) -> str:
    """Two tiles multiplied, plus ``total``."""
    # The interpreter keeps bfloat16 as raw bits and would multiply those; a float32 product is the same number.
    widened = interpret and operand is DType.bf16
    if widened:
        left, right = f"{left}.to(tl.float32)", f"{right}.to(tl.float32)"
    precise = ', input_precision="ieee"' if widened or operand is DType.f32 else ""
    return f"tl.dot({left}, {right}, {total}{precise})"


class ProductPrinter:
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
        self.batch_axes, self.batch = flatten(product.form.batch, Z)
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


def _size(weight: Load) -> int:
    numel = weight.value.type.numel
    return int(numel) if numel.is_Integer else 0
