"""The loop form of a fused kernel: what both printers print.

Every tensor op of a kernel's body becomes a function of its index; views disappear into index expressions, and a
concat splits the iteration space at its seams. RoPE's ``concat(-x2, x1)`` and a gate beside its up-projection thus
turn into one segment with several dot products that share their row of ``a`` and read other rows of the weight:

    %k = kernel %x, %w, %cos, %sin { matmul, view, concat, mul, add }
    =>
    segment x0 < 9, x1 < 32:
      %q[x0, x1]      = dot(x[k0], w[64*x0 + x1, k0]) * cos[x1] - dot(x[k0], w[64*x0 + x1 + 32, k0]) * sin[x1]
      %q[x0, x1 + 32] = ...

Passes use it to decide whether a fusion is legal; printers and the memory planner read nothing else of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
from sympy import Expr, Integer

from .errors import VerifyError
from .index import Mod, format_expr, provably_less, provably_nonnegative, simplify, sym, upper_bound
from .module import Attr, Op
from .pointwise import POINTWISE
from .types import DType, Value


@dataclass(frozen=True)
class Axis:
    """``0 <= symbol < extent``"""

    symbol: sympy.Symbol
    extent: Expr


@dataclass(frozen=True, eq=False)
class Node:
    """A scalar at a point of the iteration space. Equal nodes of one kernel are the same object."""

    dtype: DType

    @property
    def children(self) -> tuple[Node, ...]:
        return ()


@dataclass(frozen=True, eq=False)
class Load(Node):
    """An element of a tensor from outside. ``indirect`` binds symbols of ``index`` to computed integers (gather)."""

    value: Value
    index: tuple[Expr, ...]
    indirect: tuple[tuple[sympy.Symbol, Node], ...] = ()

    @property
    def children(self) -> tuple[Node, ...]:
        return tuple(node for _, node in self.indirect)


@dataclass(frozen=True, eq=False)
class Const(Node):
    value: Attr


@dataclass(frozen=True, eq=False)
class Index(Node):
    """An index or dim expression as a number."""

    expr: Expr


@dataclass(frozen=True, eq=False)
class Apply(Node):
    """A pointwise op (``pointwise.POINTWISE``) on scalars."""

    op: str
    args: tuple[Node, ...]

    @property
    def children(self) -> tuple[Node, ...]:
        return self.args


@dataclass(frozen=True, eq=False)
class Reduce(Node):
    """``kind`` (see ``ops.REDUCTIONS``) of ``body`` over ``axes``."""

    kind: str
    axes: tuple[Axis, ...]
    body: Node

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.body,)


@dataclass(frozen=True, eq=False)
class Dot(Node):
    """The sum over ``axis`` of ``a * b``, accumulated in float32 (float64 for f64)."""

    a: Node
    b: Node
    axis: Axis

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.a, self.b)


@dataclass(frozen=True)
class Store:
    """``target[index] = value``; for an append the index is the absolute context position."""

    target: Value
    index: tuple[Expr, ...]
    value: Node


@dataclass(frozen=True)
class Segment:
    """One iteration space and what is stored at each of its points."""

    axes: tuple[Axis, ...]
    stores: tuple[Store, ...]

    def nodes(self) -> Iterator[Node]:
        """Each node once, children before parents."""
        seen: set[Node] = set()
        for store in self.stores:
            yield from _post_order(store.value, seen)


@dataclass(frozen=True)
class Loops:
    """A kernel as segments; all read ``inputs`` and together write ``outputs`` once."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    segments: tuple[Segment, ...]

    def __str__(self) -> str:
        return print_loops(self)


@dataclass(frozen=True)
class MatmulForm:
    """A segment seen as a matrix product: ``dots`` share ``a`` (over rows and k); each has its own ``b`` (columns, k)."""

    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    k: Axis
    a: Node
    dots: tuple[Dot, ...]


def _post_order(node: Node, seen: set[Node]) -> Iterator[Node]:
    if node in seen:
        return
    seen.add(node)
    for child in node.children:
        yield from _post_order(child, seen)
    yield node


@lru_cache(maxsize=65536)
def free_symbols(node: Node) -> frozenset[sympy.Symbol]:
    """The index symbols (axes, not dims) that a node's value depends on."""
    own: set[sympy.Symbol] = set()
    if isinstance(node, Load):
        own = {s for e in node.index for s in e.free_symbols} - {s for s, _ in node.indirect}
    elif isinstance(node, Index):
        own = set(node.expr.free_symbols)
    for child in node.children:
        own |= free_symbols(child)
    if isinstance(node, Reduce):
        own -= {a.symbol for a in node.axes}
    elif isinstance(node, Dot):
        own.discard(node.axis.symbol)
    return frozenset(s for s in own if not s.name[:1].isupper())


class _NeedSplit(Exception):
    """The iteration space must be cut: ``symbol`` at ``at``, or tiled by ``tile`` first."""

    def __init__(self, symbol: sympy.Symbol, at: Expr | None = None, tile: Expr | None = None) -> None:
        super().__init__(symbol)
        self.symbol, self.at, self.tile = symbol, at, tile


class _Scalarizer:
    """Turns values into nodes. Nodes are interned, so that equal ones are one object."""

    def __init__(self, body: Iterable[Op]) -> None:
        self.definitions = {v: op for op in body for v in op.results}
        self.interned: dict[tuple[Any, ...], Node] = {}
        self.memo: dict[tuple[Any, ...], Node] = {}

    def make(self, kind: type[Node], *fields: Any) -> Any:
        key = (kind, *fields) if kind is not Const else (kind, *fields, repr(fields[1]))
        if key not in self.interned:
            self.interned[key] = kind(*fields)
        return self.interned[key]

    def node(self, value: Value, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int) -> Node:
        """The scalar ``value[index]``. ``depth`` numbers the reduction axes in scope."""
        index = tuple(simplify(e, ranges) for e in index)
        key = (value, index, depth, tuple(ranges.items()))
        if key not in self.memo:
            op = self.definitions.get(value)
            if op is None:
                self.memo[key] = self.make(Load, value.dtype, value, index, ())
            else:
                self.memo[key] = self._compute(op, value, index, ranges, depth)
        return self.memo[key]

    def _compute(
        self, op: Op, value: Value, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int
    ) -> Node:
        if op.opcode in POINTWISE:
            args = tuple(self.node(v, _aligned(v, index), ranges, depth) for v in op.operands)
            if op.opcode == "cast" and args[0].dtype == value.dtype:
                return args[0]
            return self.make(Apply, value.dtype, op.opcode, args)  # type: ignore[no-any-return]
        match op.opcode:
            case "const":
                return self.make(Const, value.dtype, op.attr("value"))  # type: ignore[no-any-return]
            case "iota":
                return self.make(Index, value.dtype, index[0])  # type: ignore[no-any-return]
            case "dim":
                return self.make(Index, value.dtype, op.attr("expr"))  # type: ignore[no-any-return]
            case "view":
                return self.node(op.operands[0], op.attr("map").apply(index), ranges, depth)
            case "concat":
                return self._concat(op, index, ranges, depth)
            case "gather":
                return self._gather(op, index, ranges, depth)
            case "reduce":
                return self._reduce(op, index, ranges, depth)
            case "matmul":
                return self._matmul(op, index, ranges, depth)
        raise VerifyError(f"{op.opcode} has no loop form")

    def _concat(
        self, op: Op, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int
    ) -> Node:
        axis, start = op.attr("axis"), Integer(0)
        at = index[axis]
        for part in op.operands:
            local, extent = sympy.expand(at - start), part.shape[axis]
            if provably_less(local, extent, ranges):
                return self.node(part, (*index[:axis], local, *index[axis + 1 :]), ranges, depth)
            if not provably_nonnegative(sympy.expand(local - extent), ranges):
                raise _cut(at, start + extent, ranges)
            start += extent
        raise VerifyError(f"index {at} lies outside the concat")

    def _gather(self, op: Op, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int) -> Node:
        table, ids = op.operands
        axis = op.attr("axis")
        picked = self.node(ids, index[axis : axis + ids.type.rank], ranges, depth)
        rest = index[axis + ids.type.rank :]
        if isinstance(picked, Index):
            return self.node(table, (*index[:axis], picked.expr, *rest), ranges, depth)
        if table in self.definitions:
            raise VerifyError("gather from a value computed in the same kernel")
        symbol = sym(f"g{axis}")
        return self.make(Load, table.dtype, table, (*index[:axis], symbol, *rest), ((symbol, picked),))  # type: ignore[no-any-return]

    def _reduce(self, op: Op, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int) -> Node:
        (x,) = op.operands
        reduced = op.attr("axes")
        axes, full, given = [], [], list(index)
        for n, extent in enumerate(x.shape):
            if n in reduced:
                if op.attr("keepdim"):
                    given.pop(0)
                axes.append(Axis(sym(f"k{depth + len(axes)}"), extent))
                full.append(axes[-1].symbol)
            else:
                full.append(given.pop(0))
        inner = ranges | {a.symbol: a.extent for a in axes}
        body = self.node(x, tuple(full), inner, depth + len(axes))
        return self.make(Reduce, x.dtype, op.attr("kind"), tuple(axes), body)  # type: ignore[no-any-return]

    def _matmul(self, op: Op, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int) -> Node:
        a, b = op.operands
        axis = Axis(sym(f"k{depth}"), a.shape[-1])
        inner = ranges | {axis.symbol: axis.extent}
        left = self.node(a, (*index[:-1], axis.symbol), inner, depth + 1)
        batch = index[:-2] if b.type.rank > 2 else ()
        right = self.node(b, (*batch, index[-1], axis.symbol), inner, depth + 1)
        return self.make(Dot, op.result.dtype, left, right, axis)  # type: ignore[no-any-return]


def _aligned(operand: Value, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The index into a broadcast operand."""
    tail = index[len(index) - operand.type.rank :]
    return tuple(Integer(0) if d == 1 else i for i, d in zip(tail, operand.shape, strict=True))


def _cut(at: Expr, boundary: Expr, ranges: dict[sympy.Symbol, Expr]) -> Exception:
    """How to cut the space so that ``at < boundary`` becomes decidable; a VerifyError when there is no way."""
    symbols = [s for s in at.free_symbols if s in ranges]
    if len(symbols) == 1:
        symbol = symbols[0]
        if isinstance(at, Mod) and at.args[0] == symbol:
            return _NeedSplit(symbol, tile=at.args[1])
        offset = sympy.expand(at - symbol)
        if not offset.free_symbols & set(ranges):
            return _NeedSplit(symbol, at=sympy.expand(boundary - offset))
    return VerifyError(f"cannot split an iteration space so that {at} < {boundary} is decided")


@dataclass(frozen=True)
class _Piece:
    """Part of a result's index space: ``index`` over ``axes``."""

    axes: tuple[Axis, ...]
    index: tuple[Expr, ...]

    def split(self, need: _NeedSplit) -> tuple[_Piece, ...]:
        old = next((a for a in self.axes if a.symbol == need.symbol), None)
        if old is None:
            raise VerifyError(f"cannot split the reduction axis {need.symbol} of a concat")
        if need.tile is not None:
            outer, inner = sym(old.symbol.name + "o"), sym(old.symbol.name + "i")
            if sympy.fraction(old.extent / need.tile)[1] != 1:
                raise VerifyError(f"extent {old.extent} is no multiple of {need.tile}")
            new: tuple[Axis, ...] = (Axis(outer, old.extent / need.tile), Axis(inner, need.tile))
            return (self._replace(old, new, need.tile * outer + inner),)
        assert need.at is not None
        low = self._replace(old, (Axis(old.symbol, need.at),), old.symbol)
        high = self._replace(old, (Axis(old.symbol, sympy.expand(old.extent - need.at)),), old.symbol + need.at)
        return low, high

    def _replace(self, old: Axis, new: tuple[Axis, ...], expr: Expr) -> _Piece:
        axes = tuple(a for axis in self.axes for a in (new if axis == old else (axis,)))
        return _Piece(axes, tuple(sympy.expand(e.xreplace({old.symbol: expr})) for e in self.index))

    def canonical(self) -> _Piece:
        """Unit axes dropped, the others named x0, x1, ..."""
        table: dict[sympy.Symbol, Expr] = {}
        axes: list[Axis] = []
        for axis in self.axes:
            if axis.extent == 1:
                table[axis.symbol] = Integer(0)
            else:
                table[axis.symbol] = sym(f"x{len(axes)}")
                axes.append(Axis(sym(f"x{len(axes)}"), axis.extent))
        return _Piece(tuple(axes), tuple(e.xreplace(table) for e in self.index))


def _stored(result: Value, definitions: dict[Value, Op]) -> tuple[Value, _Piece, tuple[Expr, ...]]:
    """The value whose elements are stored for ``result``, its whole space, and the shift of the stored index."""
    op = definitions.get(result)
    source, shift = result, tuple(Integer(0) for _ in result.shape)
    if op is not None and op.opcode == "append":
        source = op.operands[0]
        shift = (Integer(0), Integer(0), sym("T") - source.shape[2], Integer(0))
    axes = tuple(Axis(sym(f"a{n}"), extent) for n, extent in enumerate(source.shape))
    return source, _Piece(axes, tuple(a.symbol for a in axes)), shift


@lru_cache(maxsize=1024)
def scalarize(kernel: Op) -> Loops:
    """The loop form of a ``kernel`` op.

    Raises VerifyError when the body holds an op without a loop form (attention, calls), or an iteration space that
    cannot be cut so that every concat is decided.
    """
    scalarizer = _Scalarizer(kernel.body)
    segments: dict[tuple[Axis, ...], list[Store]] = {}
    for result in kernel.results:
        source, whole, shift = _stored(result, scalarizer.definitions)
        todo = [whole]
        while todo:
            piece = todo.pop(0)
            final = piece.canonical()
            try:
                node = scalarizer.node(source, final.index, {a.symbol: a.extent for a in final.axes}, 0)
            except _NeedSplit as need:
                todo[:0] = _Piece(final.axes, final.index).split(need)
                continue
            index = tuple(sympy.expand(e + s) for e, s in zip(final.index, shift, strict=True))
            segments.setdefault(final.axes, []).append(Store(result, index, node))
    found = tuple(Segment(axes, tuple(stores)) for axes, stores in segments.items())
    return Loops(kernel.attr("name"), kernel.operands, kernel.results, found)


def matmul_form(segment: Segment) -> MatmulForm | None:
    """The segment as a matrix product, or None when it is not one (no dots, shared batch axes, nested products)."""
    nodes = list(segment.nodes())
    dots = tuple(n for n in nodes if isinstance(n, Dot))
    if not dots or any(d.a is not dots[0].a or d.axis != dots[0].axis for d in dots):
        return None
    inside = {n for d in dots for n in _post_order(d.a, set())} | {n for d in dots for n in _post_order(d.b, set())}
    if any(isinstance(n, Dot) for n in inside):
        return None
    k = dots[0].axis
    row_symbols = free_symbols(dots[0].a) - {k.symbol}
    column_symbols = frozenset().union(*(free_symbols(d.b) for d in dots)) - {k.symbol}
    every = {a.symbol for a in segment.axes}
    if row_symbols & column_symbols or (row_symbols | column_symbols) != every:
        return None
    outside = (n for n in nodes if n not in inside)
    for node in outside:
        if isinstance(node, Reduce) and (
            free_symbols(node) - row_symbols or any(isinstance(n, Dot) for n in _post_order(node.body, set()))
        ):
            return None
    rows = tuple(a for a in segment.axes if a.symbol in row_symbols)
    columns = tuple(a for a in segment.axes if a.symbol in column_symbols)
    return MatmulForm(rows, columns, k, dots[0].a, dots)


@dataclass(frozen=True)
class AttentionForm:
    """A kernel around one attention op. For each of the op's results: the value stored for it and the store index as
    a function of ``b, h, s, d`` (or ``b, h, s, p, d`` for the split form), ops.py's index of that result."""

    op: Op
    stores: tuple[tuple[Value, tuple[Expr, ...]], ...]


@lru_cache(maxsize=1024)
def attention_form(kernel: Op) -> AttentionForm | None:
    """The kernel as an attention whose results pass through views only, or None when it is no such kernel.

    Raises VerifyError when a view cannot be inverted.
    """
    anchors = [op for op in kernel.body if op.opcode in ("attention", "attention_split")]
    if len(anchors) != 1 or any(op.opcode not in (anchors[0].opcode, "view") for op in kernel.body):
        return None
    (anchor,) = anchors
    views = _Scalarizer(op for op in kernel.body if op is not anchor)
    stores = []
    for result in kernel.results:
        _, piece, _ = _stored(result, {})
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
            raise VerifyError(f"kernel {kernel.attr('name')}: the views after {anchor.opcode} cannot be inverted")
        stores.append((number, (result, tuple(e.xreplace(table) for e in piece.index))))
    return AttentionForm(anchor, tuple(store for _, store in sorted(stores, key=lambda item: item[0])))


def _tiling(index: tuple[Expr, ...]) -> _NeedSplit | None:
    """The tiling that makes ``x % n`` and ``x // n`` plain symbols, if the index has such a pair."""
    for e in index:
        if isinstance(e, Mod) and e.args[0].is_Symbol:
            return _NeedSplit(e.args[0], tile=e.args[1])
    return None


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
            n for d in segment.nodes() if isinstance(d, Dot | Reduce) for c in d.children for n in _post_order(c, set())
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


def print_node(node: Node) -> str:
    """Text of a scalar expression."""
    match node:
        case Load(value=value, index=index, indirect=indirect):
            table = {symbol: print_node(n) for symbol, n in indirect}
            parts = [table.get(e, format_expr(e)) if e.is_Symbol else format_expr(e) for e in index]
            return f"{value}[{', '.join(parts)}]"
        case Const(value=value):
            return repr(value)
        case Index(expr=expr):
            return f"({format_expr(expr)})"
        case Apply(op=op, args=args):
            return f"{op}{':' + node.dtype.value if op == 'cast' else ''}({', '.join(map(print_node, args))})"
        case Reduce(kind=kind, axes=axes, body=body):
            return f"{kind}({', '.join(f'{a.symbol} < {a.extent}' for a in axes)}: {print_node(body)})"
        case Dot(a=a, b=b, axis=axis):
            return f"dot({axis.symbol} < {axis.extent}: {print_node(a)}, {print_node(b)})"
    raise VerifyError(f"unknown node {type(node).__name__}")


def print_loops(loops: Loops) -> str:
    """Text of the loop form, for people."""
    lines = [f"loops {loops.name}({', '.join(map(str, loops.inputs))}) -> {', '.join(map(str, loops.outputs))}"]
    for segment in loops.segments:
        lines.append(f"  for {', '.join(f'{a.symbol} < {format_expr(a.extent)}' for a in segment.axes) or 'once'}:")
        for store in segment.stores:
            where = ", ".join(map(format_expr, store.index))
            lines.append(f"    {store.target}[{where}] = {print_node(store.value)}")
    return "\n".join(lines) + "\n"


__all__ = [
    "Apply", "AttentionForm", "Axis", "Const", "Dot", "Index", "Load", "Loops", "MatmulForm", "Node", "Reduce", "Segment", "Store",
    "attention_form", "elementwise_inputs", "flops", "free_symbols", "matmul_form", "print_loops", "scalarize", "upper_bound",
]  # fmt: skip
