"""What a segment has to do, in numbers, whatever its tile: the input of the cost model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import sympy
from sympy import Expr, Integer, Symbol

from tilewright.ir.index import sym
from tilewright.ir.loops import Apply, AttentionForm, Load, Node, Reduce, Segment
from tilewright.ir.module import Op
from tilewright.ir.types import DType, Value

from .codes import BYTE_ROWS, INTEGER_ROWS, integer_unit, row_group
from .descriptors import matrix_load
from .product import Product
from .row_loops import below


@dataclass(frozen=True)
class ProductWork:
    """``dots`` products [rows, k] x [k, columns], ``batch`` times over.

    rows: 0 for a single row without an axis. itemsize: bytes of an operand as it is multiplied. weight_bytes: of a
    right operand's element in memory, a fraction where several share a byte. weight_ops, row_ops: operations that make
    a factor of an element of the right and of the left operand. stored_bytes: of an element of the result. plain: the
    right operands are matrices as they are multiplied, which TMA may copy. matrices: how many different right operands
    a batch has; 0 where each of its products has its own. integers: both operands are integers of which runs share
    factors; of a single row, what it may be rounded to. group: columns that share a scale of the rows, where both are
    bytes that tensor cores may multiply.
    """

    rows: int
    columns: int
    k: int
    dots: int
    itemsize: int
    weight_bytes: float
    weight_ops: int
    stored_bytes: int
    row_ops: int = 0
    batch: int = 1
    plain: bool = False
    matrices: int = 0
    integers: bool = False
    group: int = 0

    def of_rows(self, rows: int) -> ProductWork:
        """The same of so many rows, as integers where that many are multiplied so."""
        return replace(
            self,
            rows=0 if rows == 1 else rows,
            integers=self.integers and rows <= INTEGER_ROWS,
            group=self.group if rows <= BYTE_ROWS else 0,
        )


@dataclass(frozen=True)
class AttentionWork:
    """``parts`` times (batch rows, KV heads, splits): ``queries`` rows against ``context`` positions.

    depth: of keys and values together. cache_itemsize: bytes of one of their elements in memory, itemsize: as it is
    multiplied. stored_bytes: of an element of the result. causal: half of a square is computed.
    """

    parts: int
    queries: int
    context: int
    depth: int
    itemsize: int
    cache_itemsize: int
    stored_bytes: int
    causal: bool


@dataclass(frozen=True)
class StreamWork:
    """``points`` that are computed one by one, or the rows of a reduction. longest: of the reduced axes; 0 without one,
    None at run time only. sharers: neighbouring rows that share the longest reduction; own: the longest of each row's
    own ones then."""

    points: int
    longest: int | None
    bytes: int
    sharers: int = 1
    own: int = 0

    @property
    def pointwise(self) -> StreamWork:
        """The same, seen as points alone."""
        return replace(self, longest=0)


@dataclass(frozen=True)
class RecurrentWork:
    """``channels`` of ``rows`` sequences (of linear attention: of their heads), each with ``states`` numbers that go on
    token by token. bytes: of what every token brings and takes along, and of the states and weights."""

    rows: int
    channels: int
    states: int
    tokens: int
    bytes: int


Work = ProductWork | AttentionWork | RecurrentWork | StreamWork


@dataclass(frozen=True)
class Sizes:
    """Numbers for index expressions: the value of every run-time dim."""

    dims: dict[sympy.Symbol, int]

    def of(self, *extents: Expr) -> int:
        """The product of extents; 2**31 when one has no known size."""
        value = sympy.prod(extents, start=Integer(1)).subs(self.dims)
        return int(value) if value.is_Integer else 2**31

    def bytes(self, values: set[Value]) -> int:
        return sum(self.of(*v.shape) * v.dtype.itemsize for v in values)


def product_work(product: Product, segment: Segment, sizes: Sizes) -> ProductWork:
    form = product.form
    columns, k = sizes.of(*(a.extent for a in form.columns)), sizes.of(form.k.extent)
    inside = {n for d in form.dots for n in below(d.b)}
    batch = sizes.of(*(a.extent for a in form.batch))
    rows = batch * columns * len(form.dots)
    weights = _read_bytes(
        {n.value: n for n in inside if isinstance(n, Load)}.values(), form.k.symbol, rows, sizes
    )
    elements = max(1, rows * k)
    return ProductWork(
        rows=sizes.of(*(a.extent for a in form.rows)) if form.rows else 0,
        columns=columns,
        k=k,
        dots=len(form.dots),
        itemsize=form.dots[0].b.dtype.itemsize,
        weight_bytes=min(float(form.dots[0].b.dtype.itemsize), weights / elements),
        weight_ops=-(-sum(map(_is_instruction, inside)) // len(form.dots)),
        stored_bytes=sum(s.target.dtype.itemsize for s in segment.stores),
        row_ops=sum(map(_is_instruction, below(form.a))),
        batch=batch,
        plain=all(matrix_load(d.b, form.k.symbol) is not None for d in form.dots),
        integers=integer_unit(form) is not None,
        group=row_group(form),
    )


def _read_bytes(loads: Iterable[Load], k: Symbol, rows: int, sizes: Sizes) -> float:
    """Bytes of what a product reads of its right operands, as a segment may take only some of their rows."""
    total = 0.0
    for load in loads:
        stored = sizes.of(
            *(d for d, e in zip(load.value.shape, load.index, strict=True) if k not in e.free_symbols)
        )
        total += sizes.bytes({load.value}) * min(1.0, rows / max(1, stored))
    return total


def grouped_work(op: Op, sizes: Sizes) -> ProductWork:
    """A product per block of rows; of blocks, each chosen expert's run ends in the middle of one on average."""
    x, weights, block = op.operands[0], op.operands[3], int(op.attr("block"))
    pairs, columns = (sizes.of(d) for d in op.result.shape)
    chosen = min(pairs, sizes.of(weights.shape[0]))
    return ProductWork(
        rows=block,
        columns=columns,
        k=sizes.of(x.shape[1]),
        dots=1,
        itemsize=x.dtype.itemsize,
        weight_bytes=float(weights.dtype.itemsize),
        weight_ops=0,
        stored_bytes=op.result.dtype.itemsize,
        batch=-(-(pairs + chosen * block // 2) // block),
        matrices=chosen,
    )


def order_work(op: Op, sizes: Sizes) -> StreamWork:
    """Every expert is compared with what every pair chose."""
    pairs = sizes.of(op.operands[0].type.numel)
    moved = sizes.bytes({*op.operands, *op.results})
    return StreamWork(pairs * (int(op.attr("experts")) + 1), 0, moved)


def _is_instruction(node: Node) -> bool:
    """Whether a node costs an instruction; between floats, a cast is none, but from f8."""
    if not isinstance(node, Apply):
        return False
    if node.op == "cast" and node.args[0].dtype is DType.f8:
        return True
    return node.op != "cast" or not (node.dtype.is_float and node.args[0].dtype.is_float)


def attention_work(form: AttentionForm, sizes: Sizes) -> AttentionWork:
    q, k, v = form.op.operands[:3]
    batch, heads, new, _ = (sizes.of(d) for d in q.shape)
    groups, splits = sizes.of(k.shape[1]), max(1, int(form.op.attr("splits", 0)))
    context = min(sizes.of(k.shape[2]), int(form.op.attr("window") or 2**31) + new)
    return AttentionWork(
        parts=batch * groups * splits,
        queries=new * heads // groups,
        context=-(-context // splits),
        depth=sizes.of(k.shape[3]) + sizes.of(v.shape[3]),
        itemsize=q.dtype.itemsize,
        cache_itemsize=k.dtype.itemsize,
        stored_bytes=form.stores[0][0].dtype.itemsize,
        causal=bool(form.op.attr("causal")) and new > 1,
    )


def recurrent_work(op: Op, sizes: Sizes) -> RecurrentWork:
    result, held = op.results
    rows, tokens, *heads, channels = (sizes.of(d) for d in result.shape)
    moved = sizes.bytes({*op.operands, *op.results}) + sizes.bytes({held})
    return RecurrentWork(rows * math.prod(heads), channels, sizes.of(held.shape[-2]), tokens, moved)


def stream_work(segment: Segment, sizes: Sizes) -> StreamWork:
    """A pointwise or reducing segment; of a table that is only gathered from, the rows that are read count."""
    points = sizes.of(*(a.extent for a in segment.axes))
    extents = [
        sympy.prod([a.extent for a in n.axes], start=Integer(1))
        for n in segment.nodes()
        if isinstance(n, Reduce)
    ]
    longest = max((sizes.of(e) for e in extents), default=0)
    loads = {n.value for n in segment.nodes() if isinstance(n, Load) and not n.indirect}
    gathered = {n.value for n in segment.nodes() if isinstance(n, Load) and n.indirect} - loads
    moved = sizes.bytes(loads) + points * sum(v.dtype.itemsize for v in gathered)
    moved += points * sum(s.target.dtype.itemsize for s in segment.stores)
    known = all(e.is_Integer for e in extents)
    return StreamWork(points, longest if known else None, moved)


def sizes_of(dims: Mapping[str, int]) -> Sizes:
    return Sizes({sym(name): size for name, size in dims.items()})
