"""From a kernel's tensor ops to its loop form: each value as a function of its index."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import sympy
from sympy import Expr, Integer

from ..errors import VerifyError
from ..index import FloorDiv, Mod, provably_less, provably_nonnegative, simplify, sym
from ..module import Op
from ..pointwise import POINTWISE
from ..quantization import CODES, INT8_LARGEST
from ..types import DType, Value
from .nodes import (
    Apply,
    Axis,
    Const,
    Dot,
    Index,
    Load,
    Loops,
    Node,
    Reduce,
    Segment,
    Store,
    free_symbols,
    post_order,
)
from .pieces import NeedSplit, Piece, cut_for, stored_space


class Scalarizer:
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

    def node(
        self, value: Value, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int
    ) -> Node:
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
            return self.make(Apply, value.dtype, op.opcode, args)
        match op.opcode:
            case "const":
                return self.make(Const, value.dtype, op.attr("value"))
            case "iota":
                return self.make(Index, value.dtype, index[0])
            case "dim":
                return self.make(Index, value.dtype, op.attr("expr"))
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
            case "dequantize":
                return self._dequantize(op, index, ranges, depth)
            case "quantize" if op.attr("bits") == 8:
                return self._quantize(op, value, index, ranges, depth)
        raise VerifyError(f"{op.opcode} has no loop form")

    def _concat(self, op: Op, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int) -> Node:
        axis, start = op.attr("axis"), Integer(0)
        at, extents = index[axis], tuple(v.shape[axis] for v in op.operands)
        for number, (part, extent) in enumerate(zip(op.operands, extents, strict=True)):
            local = sympy.expand(at - start)
            if provably_less(local, extent, ranges):
                return self.node(part, (*index[:axis], local, *index[axis + 1 :]), ranges, depth)
            if not provably_nonnegative(sympy.expand(local - extent), ranges):
                raise cut_for(at, extents, number, ranges)
            start += extent
        raise VerifyError(f"index {at} lies outside the concat")

    def _gather(self, op: Op, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int) -> Node:
        table, ids = op.operands
        axis = op.attr("axis")
        picked = self.node(ids, index[axis : axis + ids.type.rank], ranges, depth)
        rest = index[axis + ids.type.rank :]
        if isinstance(picked, Index):
            return self.node(table, (*index[:axis], picked.expr, *rest), ranges, depth)
        symbol = sym(f"g{axis}")
        inner = ranges | {symbol: table.shape[axis]}
        entry = self.node(table, (*index[:axis], symbol, *rest), inner, depth)
        return self._picked(entry, symbol, picked)

    def _picked(self, node: Node, symbol: sympy.Symbol, picked: Node) -> Node:
        """``node`` with ``symbol`` bound to a computed integer in every load below."""
        match node:
            case Load(value=value, index=index, indirect=indirect):
                if not any(symbol in e.free_symbols for e in index):
                    if any(symbol in free_symbols(inner) for _, inner in indirect):
                        raise VerifyError("what a table is gathered by is itself gathered")
                    return node
                if indirect:
                    raise VerifyError("a table that is gathered from is itself gathered")
                return self.make(Load, node.dtype, value, index, (*indirect, (symbol, picked)))
            case Apply(op=op, args=args):
                bound = tuple(self._picked(a, symbol, picked) for a in args)
                return self.make(Apply, node.dtype, op, bound)
            case Const():
                return node
            case Index(expr=expr) if symbol not in expr.free_symbols:
                return node
        raise VerifyError("a table that is gathered from is computed by more than pointwise ops")

    def _reduce(self, op: Op, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int) -> Node:
        (x,) = op.operands
        reduced = op.attr("axes")
        axes: list[Axis] = []
        full: list[Expr] = []
        given = list(index)
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
        return self.make(Reduce, x.dtype, op.attr("kind"), tuple(axes), body)

    def _matmul(self, op: Op, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int) -> Node:
        a, b = op.operands
        axis = Axis(sym(f"k{depth}"), a.shape[-1])
        inner = ranges | {axis.symbol: axis.extent}
        left = self.node(a, (*index[:-1], axis.symbol), inner, depth + 1)
        batch = index[:-2] if b.type.rank > 2 else ()
        right = self.node(b, (*batch, index[-1], axis.symbol), inner, depth + 1)
        return self.make(Dot, op.result.dtype, left, right, axis, op.attr("activation_group", 0))

    def _quantize(
        self, op: Op, value: Value, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int
    ) -> Node:
        """A code of 8 bits, or the scale of a group. The space of codes is cut into groups, each of which finds its own
        scale again. No code stands for NaN, so the scale of its group is NaN."""
        x, group = op.operands[0], Integer(op.attr("group"))
        row, place = index
        if value == op.results[0]:
            if place.is_Symbol and ranges[place] != group:
                raise NeedSplit(place, tile=group)
            place = simplify(FloorDiv(place, group), ranges)
        axis = Axis(sym(f"k{depth}"), group)
        inner = ranges | {axis.symbol: group}

        def apply(opcode: str, *args: Node, dtype: DType = DType.f32) -> Node:
            return self.make(Apply, dtype, opcode, args)

        def const(number: float) -> Node:
            return self.make(Const, DType.f32, number)

        def at(column: Expr, ranges: dict[sympy.Symbol, Expr], depth: int) -> Node:
            node = self.node(x, (row, column), ranges, depth)
            return node if node.dtype is DType.f32 else apply("cast", node)

        member = at(group * place + axis.symbol, inner, depth + 1)
        largest = self.make(Reduce, DType.f32, "max", (axis,), apply("abs", member))
        scale = apply("div", largest, const(float(INT8_LARGEST)))
        if value != op.results[0]:
            strange = apply("ne", member, member, dtype=DType.bool)
            strange = self.make(Reduce, DType.bool, "any", (axis,), strange)
            return apply("where", strange, const(float("nan")), scale)
        positive = apply("gt", scale, const(0.0), dtype=DType.bool)
        divisor = apply("where", positive, scale, const(1.0))
        nearest = apply("round", apply("div", at(index[1], ranges, depth), divisor))
        return apply("cast", nearest, dtype=DType.i8)

    def _dequantize(
        self, op: Op, index: tuple[Expr, ...], ranges: dict[sympy.Symbol, Expr], depth: int
    ) -> Node:
        """``scale * code + minimum``; see ``ir.quantization`` for where a code lies."""
        codes, *factors = op.operands
        row, column = index
        place = (row, FloorDiv(column, Integer(op.attr("group"))))
        form = CODES[op.attr("bits")]
        if form.per_byte == 1:
            code = self.node(codes, index, ranges, depth)
        else:
            run, lanes = Integer(form.run), Integer(form.run // form.per_byte)
            byte = self.node(codes, (row, lanes * FloorDiv(column, run) + Mod(column, lanes)), ranges, depth)
            shift = simplify(form.bits * Mod(FloorDiv(column, lanes), Integer(form.per_byte)), ranges)
            low = self.make(Apply, DType.u8, "shr", (byte, self.make(Index, DType.u8, shift)))
            code = self.make(Apply, DType.u8, "and", (low, self.make(Const, DType.u8, 2**form.bits - 1)))
        wide = DType.f64 if op.result.dtype is DType.f64 else DType.f32

        def as_float(node: Node) -> Node:
            return node if node.dtype is wide else self.make(Apply, wide, "cast", (node,))

        scale, *minimum = (as_float(self.node(v, place, ranges, depth)) for v in factors)
        value = self.make(Apply, wide, "mul", (as_float(code), scale))
        if minimum:
            value = self.make(Apply, wide, "add", (value, minimum[0]))
        return value if op.result.dtype is wide else self.make(Apply, op.result.dtype, "cast", (value,))


def _aligned(operand: Value, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The index into a broadcast operand."""
    tail = index[len(index) - operand.type.rank :]
    return tuple(Integer(0) if d == 1 else i for i, d in zip(tail, operand.shape, strict=True))


def _separate_digits(node: Node, piece: Piece) -> None:
    """Raise NeedSplit where rows, columns and products of a batch are no axes of their own, as when a product's result
    is seen with axes merged or moved: its operands depend on both ``x // n`` and ``x % n`` of an axis x, or one on
    ``x // n`` alone and the other on more of x. Or, without a product, where a reduction depends on ``x // n`` alone,
    so that it is computed once for all the ``x % n``."""
    extents = {a.symbol: a.extent for a in piece.axes}
    nodes = tuple(post_order(node, set()))
    dots = [n for n in nodes if isinstance(n, Dot)]
    parts = dict.fromkeys(e for d in dots for side in d.children for e in _places(side))
    found = [
        p.args for p in parts if isinstance(p, Mod) and p.args[0] in extents and FloorDiv(*p.args) in parts
    ]
    for dot in dots:
        for side, other in ((dot.a, dot.b), (dot.b, dot.a)):
            known, symbols = _quotients(other, extents), {s for e in _places(other) for s in e.free_symbols}
            found += [(x, n) for x, n in _quotients(side, extents) if (x, n) not in known and x in symbols]
    if not dots:
        found += [args for n in nodes if isinstance(n, Reduce) for args in _quotients(n, extents)]
    for symbol, tile in found:
        if sympy.fraction(extents[symbol] / tile)[1] == 1:
            raise NeedSplit(symbol, tile=tile)


def _places(node: Node) -> dict[Expr, None]:
    """All parts of the indices by which a node and those below it read tensors, in order."""
    loads = (n for n in post_order(node, set()) if isinstance(n, Load))
    return {e: None for load in loads for i in load.index for e in sympy.preorder_traversal(i)}


def _quotients(node: Node, extents: dict[sympy.Symbol, Expr]) -> list[tuple[Expr, Expr]]:
    """(x, n) of each axis x that a node depends on by ``x // n`` alone."""
    divided: dict[Expr, set[Expr]] = {}
    for part in _places(node):
        if isinstance(part, FloorDiv) and part.args[0] in extents:
            divided.setdefault(part.args[0], set()).add(part.args[1])
    whole = {
        s for load in post_order(node, set()) if isinstance(load, Load | Index)
        for e in (load.index if isinstance(load, Load) else (load.expr,))
        for s in e.replace(lambda p: isinstance(p, FloorDiv), lambda p: Integer(0)).free_symbols
    }  # fmt: skip
    return [(x, *sizes) for x, sizes in divided.items() if len(sizes) == 1 and x not in whole]


@lru_cache(maxsize=1024)
def scalarize(kernel: Op) -> Loops:
    """The loop form of a ``kernel`` op.

    Raises VerifyError when the body holds an op without a loop form (attention, calls), or an iteration space that
    cannot be cut so that every concat is decided.
    """
    scalarizer = Scalarizer(kernel.body)
    segments: dict[tuple[Axis, ...], list[Store]] = {}
    for result in kernel.results:
        source, whole, shift = stored_space(result, scalarizer.definitions)
        todo = [whole]
        while todo:
            piece = todo.pop(0)
            final = piece.canonical()
            try:
                node = scalarizer.node(source, final.index, {a.symbol: a.extent for a in final.axes}, 0)
                _separate_digits(node, final)
            except NeedSplit as need:
                todo[:0] = Piece(final.axes, final.index).split(need)
                continue
            index = tuple(sympy.expand(e + s) for e, s in zip(final.index, shift, strict=True))
            segments.setdefault(final.axes, []).append(Store(result, index, node))
    found = tuple(Segment(axes, tuple(stores)) for axes, stores in segments.items())
    return Loops(kernel.attr("name"), kernel.operands, kernel.results, found)
