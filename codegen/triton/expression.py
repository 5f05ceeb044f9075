"""Scalar expression trees (``ir.loops``) as Triton expressions over blocks.

A context says what each axis symbol is: an expression over *block symbols*, each of which is a variable in the kernel
that holds a block of indices, shaped so that blocks of different symbols broadcast against each other:

    axes    x0 -> m // S, x2 -> m % S, k0 -> k
    blocks  m -> "m" ([BLOCK_M, 1], mask "m_ok"), k -> "k" ([1, BLOCK_K], no mask)
    %x[x0, x2, k0]  =>  x = tl.load(p_x + (m * 576 + k), mask=m_ok, other=0.0)

A value is computed in the outermost scope that knows its blocks, once per kernel.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import sympy
from sympy import Expr

from tilewright.ir.errors import VerifyError
from tilewright.ir.index import FloorDiv, Mod, linear_index, simplify, sym
from tilewright.ir.loops import Apply, Axis, Const, Dot, Index, Load, Node, Reduce, Store, free_symbols
from tilewright.ir.program import physical_shape
from tilewright.ir.types import DType, Value

from .descriptors import Descriptor
from .pointwise_ops import TRITON, TRITON_TYPES, compute_dtype, literal
from .text import Scope, deepest, print_index

LONGEST_INLINE = 48
"""Longer expressions get a variable of their own."""


@dataclass(frozen=True)
class Block:
    """A block symbol in one context: the variable, its mask ("" when every lane is in range), and where it lives."""

    text: str
    mask: str
    scope: Scope
    extent: Expr


@dataclass(frozen=True)
class Operand:
    """Text of a computed value and the innermost scope that it needs. ``atomic``: needs no parentheses."""

    text: str
    scope: Scope
    atomic: bool = True


@dataclass(frozen=True)
class Pointers:
    """What a kernel knows of its tensors: argument names, capacity of T, ranges of the run-time dims, and which tensors
    are weights, which no kernel writes. ``descriptors`` collects those that the kernel's segments read through."""

    names: Mapping[Value, str]
    capacity: int
    largest: Mapping[str, int]
    constants: frozenset[Value] = frozenset()
    descriptors: dict[str, Descriptor] = field(default_factory=dict)

    def shape(self, value: Value) -> tuple[Expr, ...]:
        """The dims that the tensor is laid out with."""
        return physical_shape(value.type, self.capacity)

    def is_large(self, value: Value) -> bool:
        """True when offsets into the tensor may exceed 32 bits."""
        bounds = {sym(name): size for name, size in self.largest.items()}
        numel = sympy.prod(self.shape(value), start=sympy.Integer(1)).subs(bounds)
        return not (numel.is_Integer and int(numel) < 2**31)


@dataclass
class Context:
    """Emits nodes under one meaning of the axis symbols. ``shared`` nodes are used more than once and get a variable.
    ``bound`` holds values that a template has computed (reductions, accumulators); contexts of one kernel share it."""

    base: Scope
    pointers: Pointers
    axes: dict[sympy.Symbol, Expr]
    blocks: dict[sympy.Symbol, Block]
    shared: frozenset[Node] = frozenset()
    bound: dict[Node, Operand] = field(default_factory=dict)
    _memo: dict[Node, Operand] = field(default_factory=dict)

    def extended(self, axes: Mapping[sympy.Symbol, Expr], blocks: Mapping[sympy.Symbol, Block]) -> Self:
        """This context with more axes and blocks."""
        axes, blocks = {**self.axes, **axes}, {**self.blocks, **blocks}
        return type(self)(self.base, self.pointers, axes, blocks, self.shared, self.bound)

    def emit(self, node: Node) -> Operand:
        """The value of a node, in its compute dtype, as text."""
        if node in self.bound:
            return self.bound[node]
        if node not in self._memo:
            self._memo[node] = self._compute(node)
        return self._memo[node]

    def _compute(self, node: Node) -> Operand:
        match node:
            case Const(value=value):
                return Operand(literal(value, node.dtype), self.base)
            case Index(expr=expr):
                text, scope = self.index(expr)
                return Operand(scope.bind(f"tl.cast({text}, {TRITON_TYPES[node.dtype]})", "i"), scope)
            case Load():
                return self.load(node, convert=True)
            case Apply():
                return self._apply(node)
            case Reduce() | Dot():
                return self.reduction(node)
        raise VerifyError(f"unknown node {type(node).__name__}")

    def reduction(self, node: Reduce | Dot) -> Operand:
        """A reduction that no template has computed. Only the generic template can compute one in place."""
        raise VerifyError("a reduction inside another one needs the generic template")

    def named(self, node: Node, hint: str = "t") -> Operand:
        """As :meth:`emit`, but a variable or a literal."""
        value = self.emit(node)
        if value.atomic:
            return value
        return Operand(value.scope.bind(value.text, hint), value.scope)

    def _apply(self, node: Apply) -> Operand:
        values = [self.emit(a) for a in node.args]
        scope = deepest([self.base, *(v.scope for v in values)])
        dtype = compute_dtype(node.args[-1].dtype)
        if node.op == "cast":
            return self._cast(node, values[0], scope)
        texts = [self._argument(v, scope) for v in values]
        if all(isinstance(a, Const) for a in node.args):
            texts = [
                f"tl.full((), {t}, {TRITON_TYPES[compute_dtype(a.dtype)]})"
                for t, a in zip(texts, node.args, strict=True)
            ]
        text = TRITON[node.op](tuple(texts), dtype)
        if len(text) > LONGEST_INLINE or "tl." in text or node in self.shared:
            return Operand(scope.bind(text), scope)
        return Operand(text, scope, atomic=is_call(text))

    def _argument(self, value: Operand, scope: Scope) -> str:
        """An operand inside a larger expression of ``scope``; what belongs further out is computed there."""
        if value.atomic:
            return value.text
        if value.scope is not scope:
            return value.scope.bind(value.text)
        return f"({value.text})"

    def _cast(self, node: Apply, value: Operand, scope: Scope) -> Operand:
        """Float to float is no change of value inside a kernel, except to and from f64."""
        (source,) = node.args
        before, after = compute_dtype(source.dtype), compute_dtype(node.dtype)
        if before is after:
            return value
        if isinstance(source, Const):
            return Operand(literal(source.value, after), self.base)
        inner = self._argument(value, scope)
        if after is DType.bool:
            return Operand(f"{inner} != 0", scope, atomic=False)
        return Operand(f"{inner}.to({TRITON_TYPES[after]})", scope)

    def load(self, node: Load, convert: bool) -> Operand:
        """A load; ``convert`` widens it to the compute dtype."""
        address, mask, scope = self.address(node)
        zero = "0.0" if node.dtype.is_float and node.dtype is not DType.f8 else "0"
        guard = f", mask={mask}, other={zero}" if mask else ""
        hint = self.pointers.names[node.value].removeprefix("p_")
        value = scope.bind(f"tl.load({address}{guard})", hint)
        if convert and node.dtype is DType.bool:
            value = scope.bind(f"{value} != 0", value)
        elif convert and node.dtype is DType.f8:
            value = scope.bind(f"f8_to_float({value})", value)
        elif convert and compute_dtype(node.dtype) is not node.dtype:
            value = scope.bind(f"{value}.to({TRITON_TYPES[compute_dtype(node.dtype)]})", value)
        return Operand(value, scope)

    def address(self, node: Load) -> tuple[str, str, Scope]:
        """Text of the address of a load, its mask ("" where every lane is in range), and the scope that both need."""
        wide = self.pointers.is_large(node.value)
        indirect = {symbol: self._looked_up(index, wide) for symbol, index in node.indirect}
        offset = linear_index(node.index, self.pointers.shape(node.value))
        text, scope = self.index(offset, wide, indirect)
        where = "" if text == "0" else f" + {text}" if text.isidentifier() else f" + ({text})"
        return f"{self.pointers.names[node.value]}{where}", self._mask(node), scope

    def _looked_up(self, index: Node, wide: bool) -> Operand:
        """An index that the kernel computes or loads; ``wide`` where an offset of 32 bits would overflow."""
        row = self.named(index, "row")
        if not wide or index.dtype is DType.i64:
            return row
        return Operand(row.scope.bind(f"tl.cast({row.text}, tl.int64)", "row"), row.scope)

    def operand(self, node: Node, dtype: DType) -> Operand:
        """A factor of a product, rounded to the operand dtype as tensor cores see it."""
        while (
            isinstance(node, Apply)
            and node.op == "cast"
            and node.dtype is dtype
            and node.args[0].dtype is dtype
        ):
            node = node.args[0]
        if isinstance(node, Load) and node.dtype is dtype and node not in self.bound:
            return self.load(node, convert=False)
        value = self.named(node)
        if compute_dtype(dtype) is dtype:
            return value
        return Operand(value.scope.bind(f"{value.text}.to({TRITON_TYPES[dtype]})"), value.scope)

    def varies(self, node: Node) -> set[sympy.Symbol]:
        """The block symbols that shape a node's value."""
        return {s for axis in free_symbols(node) for s in self._symbols(axis)}

    def shaped(
        self, value: Operand, node: Node, lanes: Sequence[sympy.Symbol], shape: str, hint: str = "t"
    ) -> Operand:
        """``value``, that of ``node``, with every one of ``lanes``: repeated along those it does not vary with."""
        if set(lanes) <= self.varies(node):
            return value
        scope = deepest([value.scope, *(self.blocks[s].scope for s in lanes)])
        return Operand(scope.bind(f"tl.broadcast_to({value.text}, {shape})", hint), scope)

    def store(self, store: Store, scope: Scope, lanes: Iterable[sympy.Symbol] = ()) -> None:
        """Write a store into ``scope``. ``lanes`` are the blocks that shape the value; the address need not mention
        those of extent 1."""
        value = self.named(store.value).text
        stored = f"float_to_f8({value})" if store.target.dtype is DType.f8 else value
        pointer = self.pointers.names[store.target]
        address = linear_index(store.index, self.pointers.shape(store.target))
        text, _ = self.index(address, self.pointers.is_large(store.target))
        mentioned = self._symbols(address)
        text += "".join(
            f" + {self.blocks[s].text} * 0" for s in lanes if self.blocks[s].text not in _words(text)
        )
        mask = self._masks(mentioned | set(lanes))
        guard = f", mask={mask}" if mask else ""
        scope.line(f"tl.store({pointer} + ({text}), {stored}{guard})")

    def _symbols(self, expr: Expr) -> set[sympy.Symbol]:
        """The block symbols that an expression over axes depends on."""
        return {s for s in expr.xreplace(self.axes).free_symbols if s in self.blocks}

    def _masks(self, symbols: set[sympy.Symbol]) -> str:
        """The conjunction of the blocks' masks."""
        masks = {self.blocks[s].mask for s in symbols} - {""}
        return " & ".join(sorted(masks))

    def _mask(self, node: Load) -> str:
        """The mask of a load: in-range lanes of every block that its address depends on."""
        symbols: set[sympy.Symbol] = set()
        pending: list[Node] = [node]
        while pending:
            current = pending.pop()
            if isinstance(current, Load):
                symbols |= {s for e in current.index for s in self._symbols(e)}
            pending.extend(current.children)
        return self._masks(symbols)

    def over_blocks(self, expr: Expr) -> Expr:
        """An index expression over axes as one over block symbols."""
        # A block of extent 1 is kept in the address, which thus has the shape that masks and other operands have.
        extents = {s: b.extent for s, b in self.blocks.items() if b.extent != 1}
        return simplify(sympy.expand(expr.xreplace(self.axes)), extents)

    def index(
        self, expr: Expr, wide: bool = False, indirect: Mapping[sympy.Symbol, Operand] | None = None
    ) -> tuple[str, Scope]:
        """Text and scope of an index expression over axes, dims and ``indirect`` symbols."""
        indirect = indirect or {}
        over_blocks = self.over_blocks(expr)
        used = over_blocks.free_symbols
        scopes = [self.base, *(b.scope for s, b in self.blocks.items() if s in used)]
        scopes += [v.scope for s, v in indirect.items() if s in used]

        def name(symbol: sympy.Symbol) -> str:
            if symbol in indirect:
                return indirect[symbol].text
            if symbol not in self.blocks:
                return str(symbol)
            text = self.blocks[symbol].text
            return f"{text}.to(tl.int64)" if wide else text

        return print_index(over_blocks, name), deepest(scopes)


def shared_nodes(nodes: Iterable[Node]) -> frozenset[Node]:
    """Those that more than one of ``nodes`` uses."""
    counts = Counter(child for node in nodes for child in set(node.children))
    return frozenset(node for node, count in counts.items() if count > 1)


def is_call(text: str) -> bool:
    """True for a single call such as ``f(a, b(c))``."""
    opened = re.match(r"[\w.]+\(", text)
    if opened is None:
        return False
    depth = 0
    for position, char in enumerate(text):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if char == ")" and depth == 0:
            return position == len(text) - 1
    return False


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def flatten(axes: Sequence[Axis], symbol: sympy.Symbol) -> tuple[dict[sympy.Symbol, Expr], Expr]:
    """Axes as digits of one flat index (row-major), and the flat extent.

    ``(x0 < B, x1 < S)`` over m gives ``{x0: m // S, x1: m % S}`` and ``B*S``.
    """
    table: dict[sympy.Symbol, Expr] = {}
    rest: Expr = symbol
    for number, axis in reversed(list(enumerate(axes))):
        table[axis.symbol] = rest if number == 0 else Mod(rest, axis.extent)
        rest = FloorDiv(rest, axis.extent)
    return table, sympy.expand(sympy.prod([a.extent for a in axes], start=sympy.Integer(1)))
