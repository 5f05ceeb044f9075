"""What a kernel is as a whole: a matrix product, an attention, experts, safe to run in place; and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sympy
from sympy import Expr, Integer

from ..errors import VerifyError
from ..index import Mod, sym
from ..module import Op
from ..recurrent import RECURRENT
from ..types import Value
from .nodes import Apply, Axis, Dot, Load, Loops, Node, Reduce, Segment, free_symbols, post_order
from .pieces import NeedSplit, stored_space
from .scalarize import Scalarizer


@dataclass(frozen=True)
class MatmulForm:
    """A segment seen as a matrix product: ``dots`` share ``a`` (rows, k); each has its own ``b`` (columns, k). Along
    ``batch``, both operands move: so many products side by side."""

    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    k: Axis
    a: Node
    dots: tuple[Dot, ...]
    batch: tuple[Axis, ...] = ()


def product_form(segment: Segment) -> MatmulForm | None:
    """The segment as a matrix product, perhaps one of a batch, or None when it is none (no dots, nested products)."""
    nodes = list(segment.nodes())
    dots = tuple(n for n in nodes if isinstance(n, Dot))
    if not dots or any(d.a is not dots[0].a or d.axis != dots[0].axis for d in dots):
        return None
    inside = {n for d in dots for n in post_order(d.a, set())} | {
        n for d in dots for n in post_order(d.b, set())
    }
    if any(isinstance(n, Dot) for n in inside):
        return None
    k = dots[0].axis
    row_symbols = free_symbols(dots[0].a) - {k.symbol}
    column_symbols = frozenset().union(*(free_symbols(d.b) for d in dots)) - {k.symbol}
    if (row_symbols | column_symbols) != {a.symbol for a in segment.axes}:
        return None
    outside = (n for n in nodes if n not in inside)
    for node in outside:
        if isinstance(node, Reduce) and (
            free_symbols(node) - row_symbols or any(isinstance(n, Dot) for n in post_order(node.body, set()))
        ):
            return None

    def among(symbols: frozenset[sympy.Symbol]) -> tuple[Axis, ...]:
        return tuple(a for a in segment.axes if a.symbol in symbols)

    shared = row_symbols & column_symbols
    return MatmulForm(
        among(row_symbols - shared), among(column_symbols - shared), k, dots[0].a, dots, among(shared)
    )


@dataclass(frozen=True)
class AttentionForm:
    """A kernel around one attention op. For each of the op's results, in order: the value that all of it is stored as,
    and the store index as a function of ``b, h, s, d`` (or ``b, h, s, p, d`` for the split form), ops.py's index of
    that result."""

    op: Op
    stores: tuple[tuple[Value, tuple[Expr, ...]], ...]


@lru_cache(maxsize=1024)
def attention_form(kernel: Op) -> AttentionForm | None:
    """The kernel as an attention whose results pass through views only, or None when it is no such kernel: also when a
    result is stored several times, in part, or not at all.

    Raises VerifyError when a view cannot be inverted.
    """
    anchors = [op for op in kernel.body if op.opcode in ("attention", "attention_split")]
    if len(anchors) != 1 or any(op.opcode not in (anchors[0].opcode, "view") for op in kernel.body):
        return None
    (anchor,) = anchors
    views = Scalarizer(op for op in kernel.body if op is not anchor)
    stores: list[tuple[int, tuple[Value, tuple[Expr, ...]]]] = []
    for result in kernel.results:
        _, piece, _ = stored_space(result, {})
        while True:
            piece = piece.canonical()
            node = views.node(result, piece.index, {a.symbol: a.extent for a in piece.axes}, 0)
            assert isinstance(node, Load)
            need = _tiling(node.index)
            if need is None:
                break
            (piece,) = piece.split(need)
        number = anchor.results.index(node.value)
        names = "bhspd" if anchor.opcode == "attention_split" and number == 0 else "bhsp"
        if anchor.opcode == "attention":
            names = "bhsd"
        table = {e: sym(n) for e, n in zip(node.index, names, strict=True) if e.is_Symbol}
        if len(table) != len(piece.axes):
            raise VerifyError(
                f"kernel {kernel.attr('name')}: the views after {anchor.opcode} cannot be inverted"
            )
        stores.append((number, (result, tuple(e.xreplace(table) for e in piece.index))))
    stores.sort(key=lambda item: item[0])
    if [number for number, _ in stores] != list(range(len(anchor.results))):
        return None
    if any(sympy.expand(v.type.numel - anchor.results[n].type.numel) != 0 for n, (v, _) in stores):
        return None
    return AttentionForm(anchor, tuple(store for _, store in stores))


def sole_op(kernel: Op) -> Op | None:
    """The one op that a kernel is, of those that have no views beside them; None when it is another kernel."""
    (first, *rest) = kernel.body
    return first if first.opcode in _SOLE and not rest else None


def _tiling(index: tuple[Expr, ...]) -> NeedSplit | None:
    """The tiling that makes ``x % n`` and ``x // n`` plain symbols, if the index has such a pair."""
    for e in index:
        if isinstance(e, Mod) and e.args[0].is_Symbol:
            return NeedSplit(e.args[0], tile=e.args[1])
    return None


EXPERTS = ("experts", "experts_order", "grouped_matmul")
_SOLE = (*EXPERTS, *RECURRENT)
PRIMITIVES = ("attention", "attention_split", *_SOLE)
"""Ops without a loop form, each of which is the only one of its kernel, but for an attention's views."""


def elementwise_inputs(loops: Loops) -> frozenset[tuple[Value, Value]]:
    """Pairs (input, output) of equal size that may share memory: each element of the output is stored by the one
    iteration that reads the input, at the same index, and nothing else reads that input.

    A product's row operand, a reduction's operand and a gathered table are read by several iterations, so they never
    qualify.
    """
    pairs: set[tuple[Value, Value]] = set()
    for segment in loops.segments:
        for store in segment.stores:
            for value in loops.inputs:
                if value.shape == store.target.shape and value.dtype.itemsize == store.target.dtype.itemsize:
                    pairs.add((value, store.target))
    for segment in loops.segments:
        written = {s.target: s.index for s in segment.stores}
        read_inside = {
            n
            for d in segment.nodes()
            if isinstance(d, Dot | Reduce)
            for c in d.children
            for n in post_order(c, set())
        }
        for node in segment.nodes():
            if not isinstance(node, Load):
                continue
            for pair in [p for p in pairs if p[0] == node.value]:
                indexes = [s.index for s in segment.stores if s.target == pair[1]]
                alone = len(indexes) == 1 and indexes[0] == node.index
                if node in read_inside or node.indirect or pair[1] not in written or not alone:
                    pairs.discard(pair)
    return frozenset(pairs)


def flops(loops: Loops) -> Expr:
    """Floating-point operations, a multiply-add counted as two; pointwise ops count one each."""
    total: Expr = Integer(0)
    for segment in loops.segments:
        space = {a.symbol: a.extent for a in segment.axes}
        for node in segment.nodes():
            points = sympy.prod([space[s] for s in free_symbols(node) if s in space], start=Integer(1))
            if isinstance(node, Dot):
                total += 2 * points * node.axis.extent
            elif isinstance(node, Reduce):
                total += points * sympy.prod([a.extent for a in node.axes], start=Integer(1))
            elif isinstance(node, Apply) and node.op != "cast" and node.dtype.is_float:
                total += points
    return sympy.expand(total)
