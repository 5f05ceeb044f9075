"""Which segments of a kernel are matrix products together, and how their operands lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import sympy
from sympy import Expr, Integer

from tilewright.ir.loops import (
    Apply,
    Axis,
    Dot,
    Load,
    MatmulForm,
    Node,
    Reduce,
    Segment,
    free_symbols,
    product_form,
)
from tilewright.ir.types import DType

from .ctypes_of import STORAGE
from .expression import print_index
from .kernel_context import KernelContext, coefficient, contains, product
from .quantized import GROUP, MAX_ROWS, StoredWeight, stored_weights

GEMV_MAX_ROWS = 8  # gemv.h says why
_FLOATS = (DType.f32, DType.f16, DType.bf16)


@dataclass(frozen=True)
class Group:
    """Matrix products of one kernel with the same row operand; along ``batch``, so many of them side by side."""

    forms: tuple[MatmulForm, ...]
    segments: tuple[Segment, ...]

    @property
    def rows(self) -> tuple[Axis, ...]:
        return self.forms[0].rows

    @property
    def batch(self) -> tuple[Axis, ...]:
        return self.forms[0].batch

    @property
    def row_count(self) -> Expr:
        return product([a.extent for a in self.rows])

    @property
    def depth(self) -> Expr:
        return self.forms[0].k.extent

    @property
    def few_rows(self) -> bool:
        """Whether a gemv applies: a small constant number of rows, and weights that lie in memory as it reads them."""
        count = self.row_count
        if not count.is_Integer or self.batch:
            return False
        if self.stored is not None:
            rounded = all(d.activation_group == GROUP for f in self.forms for d in f.dots)
            return bool(rounded and count <= MAX_ROWS)
        return bool(count <= GEMV_MAX_ROWS and self.weight is not None)

    @cached_property
    def stored(self) -> tuple[tuple[StoredWeight, ...], ...] | None:
        """The stored weights of each form's dots, when all are codes of one kind that lie in blocks."""
        found = [stored_weights(f) for f in self.forms]
        weights = tuple(w for w in found if w is not None)
        return weights if len(weights) == len(found) and len({w[0].kind for w in weights}) == 1 else None

    @property
    def weight(self) -> DType | None:
        """The element type of the weights when all dots load them directly, k contiguous."""
        loads = {_weight_type(d, f.k) for f in self.forms for d in f.dots}
        return loads.pop() if len(loads) == 1 else None

    @property
    def factor(self) -> DType:
        """What the weights are multiplied as: their own type, and floats where they are computed. Codes that are
        expanded for rows of bf16 become bf16, as eager mode would have such weights."""
        if self.weight is not None:
            return self.weight
        expanded = self.stored is not None and not self.few_rows
        return DType.bf16 if expanded and self.forms[0].a.dtype is DType.bf16 else DType.f32

    @property
    def row_values(self) -> tuple[Node, ...]:
        """What the epilogues need that is reduced once per row, such as the scale of RMSNorm."""
        symbols = {a.symbol for a in (*self.rows, *self.batch)}
        found: dict[Node, None] = {}

        def visit(node: Node) -> None:
            if isinstance(node, Dot):
                return
            if free_symbols(node) <= symbols and contains(node, (Reduce,)) and not contains(node, (Dot,)):
                found[node] = None
                return
            for child in node.children:
                visit(child)

        for segment in self.segments:
            for store in segment.stores:
                visit(store.value)
        return tuple(found)


def weight_load(dot: Dot) -> Load | None:
    """The load behind a dot's weight, when it is used as it is stored; f8 is exact in every type it is cast to."""
    b = dot.b
    if isinstance(b, Apply) and b.op == "cast" and b.args[0].dtype is DType.f8:
        b = b.args[0]
    return b if isinstance(b, Load) else None


def _weight_type(dot: Dot, k: Axis) -> DType | None:
    b = weight_load(dot)
    if b is None or b.indirect or b.dtype not in (*_FLOATS, DType.f8) or b.index[-1] != k.symbol:
        return None
    return None if any(k.symbol in e.free_symbols for e in b.index[:-1]) else b.dtype


def matmul_groups(segments: tuple[Segment, ...]) -> tuple[list[Group], list[Segment]]:
    """Matrix products by row operand, and the segments that are none (or are in float64, which the headers lack).

    So are products of a batch that packing would not make faster.
    """
    groups: dict[tuple[Node | Axis, ...], list[tuple[MatmulForm, Segment]]] = {}
    others: list[Segment] = []
    for segment in segments:
        form = product_form(segment)
        if form is None or any(d.dtype not in _FLOATS for d in form.dots) or _is_small(form):
            others.append(segment)
        else:
            groups.setdefault((form.a, *form.rows, *form.batch), []).append((form, segment))
    made = [Group(tuple(f for f, _ in pairs), tuple(s for _, s in pairs)) for pairs in groups.values()]
    return made, others


def _is_small(form: MatmulForm) -> bool:
    """Whether products of a batch are better computed element by element: they have few rows, or weights that are
    computed by more than a cast, which each of them would compute anew."""

    def is_read(node: Node) -> bool:
        return isinstance(node.args[0] if isinstance(node, Apply) and node.op == "cast" else node, Load)

    rows = product([a.extent for a in form.rows])
    few = rows.is_Integer and rows <= GEMV_MAX_ROWS
    return bool(form.batch) and bool(few or not all(is_read(d.b) for d in form.dots))


@dataclass(frozen=True)
class RowsInMemory:
    """Rows of activations that lie in memory as a product reads them, if it multiplies what they are stored as: bf16
    are multiplied by some processors, which the printed text does not know.

    first: address of the first row. distance: elements from row to row. element: what they are stored as, in C++.
    """

    first: str
    distance: Expr
    element: str


def rows_in_memory(kernel: KernelContext, group: Group) -> RowsInMemory | None:
    """Where the row operand of a group lies; None where it is computed, or its rows are not runs of whole vectors at
    equal distances."""
    a, k = group.forms[0].a, group.forms[0].k
    if not isinstance(a, Load) or a.indirect or a.dtype not in (DType.f32, DType.bf16):
        return None
    if not k.extent.is_Integer or k.extent % 32 != 0:
        return None
    ranges = {x.symbol: x.extent for x in (*group.rows, k)}
    offset = kernel.offset(a.value, a.index, ranges | {x.symbol: x.extent for x in group.batch})
    if coefficient(offset, k.symbol) != 1:
        return None
    distance: Expr | None = None
    inner: Expr = Integer(1)
    for axis in reversed(group.rows):
        step = coefficient(offset, axis.symbol)
        if step is None:
            return None
        if distance is None:
            distance = step
        elif sympy.expand(step - distance * inner) != 0:
            return None
        inner *= axis.extent
    start = offset.xreplace({s: Integer(0) for s in ranges})
    first = f"{kernel.names[a.value]} + {print_index(start)}"
    return RowsInMemory(first, k.extent if distance is None else distance, STORAGE[a.dtype])
