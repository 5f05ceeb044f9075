"""Scalar expression trees as C++ statements, each computed in the outermost loop that knows its indices.

A printer of loops opens a scope per loop nest level (``scope``), hoists what can be computed there (``hoist``) and asks
for the text of the values that it stores (``text``). A value used several times becomes a variable; equal reductions
are computed once, even when their reduction axes have other names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import sympy
from sympy import Expr

from tilewright.ir.index import sym
from tilewright.ir.loops import Apply, Axis, Const, Dot, Index, Load, Node, Reduce, free_symbols

from .ctypes_of import literal, load, scalar
from .expression import combine, initial, print_index, print_op, simd_reduction
from .kernel_context import KernelContext
from .writer import Writer

Symbols = tuple[sympy.Symbol, ...]
SUM_BLOCK = 512  # terms of a float32 sum that are added up in a row (in each lane of a vector: fewer)


class Identities:
    """Numbers nodes so that two that compute the same, up to names of their own reduction axes, get one number."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self._known: dict[tuple[int, Symbols], tuple[Node, int]] = {}

    def of(self, node: Node, bound: Symbols = ()) -> int:
        """``bound``: reduction axes around the node, outermost first."""
        if not free_symbols(node) & set(bound):
            bound = ()
        key = (id(node), bound)
        if key not in self._known:
            number = self._numbers.setdefault(self._structure(node, bound), len(self._numbers))
            self._known[key] = (node, number)  # holding the node keeps its id from being used again
        return self._known[key][1]

    def _structure(self, node: Node, bound: Symbols) -> object:
        table = {s: sym(f"bound{n}") for n, s in enumerate(bound)}
        match node:
            case Load(value=value, index=index, indirect=indirect):
                picked = {s: sym(f"picked{self.of(n, bound)}") for s, n in indirect}
                return ("load", value, tuple(e.xreplace(picked | table) for e in index))
            case Const(value=value):
                return ("const", node.dtype, repr(value))
            case Index(expr=expr):
                return ("index", node.dtype, expr.xreplace(table))
            case Apply(op=op, args=args):
                return (op, node.dtype, tuple(self.of(a, bound) for a in args))
            case Reduce(kind=kind, axes=axes, body=body):
                inner = (*bound, *(a.symbol for a in axes))
                return ("reduce", kind, tuple(a.extent for a in axes), len(bound), self.of(body, inner))
            case Dot(a=a, b=b, axis=axis):
                inner = (*bound, axis.symbol)
                return ("dot", node.dtype, axis.extent, len(bound), self.of(a, inner), self.of(b, inner))
        raise TypeError(type(node).__name__)


class Scalars:
    """Prints nodes into the writer of a kernel. ``roots`` are all values that will be asked for."""

    def __init__(self, kernel: KernelContext, roots: Iterable[Node], bound: Iterable[Axis] = ()) -> None:
        self.kernel = kernel
        self.writer = kernel.writer
        self.identities = Identities()
        self.ranges: dict[sympy.Symbol, Expr] = {a.symbol: a.extent for a in bound}
        self.names: dict[int, str] = {}
        self.in_simd = False
        self.uses: Counter[int] = Counter()
        self.opaque: set[int] = set()
        self._hiding: dict[int, bool] = {}
        seen: set[int] = set()
        for root in roots:
            self._count(root, seen)

    def _count(self, node: Node, seen: set[int]) -> None:
        number = self.identities.of(node)
        self.uses[number] += 1
        if number not in seen:
            seen.add(number)
            for child in node.children:
                self._count(child, seen)

    # -- scopes ------------------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, axes: Iterable[Axis] = (), simd: bool = False) -> Iterator[None]:
        """Make the symbols of ``axes`` known; what is computed inside is forgotten at the end."""
        names, ranges, in_simd = dict(self.names), dict(self.ranges), self.in_simd
        self.ranges |= {a.symbol: a.extent for a in axes}
        self.in_simd = self.in_simd or simd
        yield
        self.names, self.ranges, self.in_simd = names, ranges, in_simd

    def bind(self, node: Node, name: str) -> None:
        """Use ``name`` for a node, and never compute what is below it."""
        self.names[self.identities.of(node)] = name

    def hide(self, nodes: Iterable[Node]) -> None:
        """Nodes that get a name later on: not to be computed by ``hoist``, nor what holds them."""
        self.opaque |= {self.identities.of(n) for n in nodes}
        self._hiding.clear()

    def hoist(self, roots: Iterable[Node]) -> None:
        """Compute here everything below ``roots`` that depends only on the symbols known here."""
        for root in roots:
            self._hoist(root, set())

    def _hoist(self, node: Node, seen: set[Node]) -> None:
        number = self.identities.of(node)
        if node in seen or number in self.names or number in self.opaque or isinstance(node, Const | Index):
            return
        seen.add(node)
        if free_symbols(node) <= self.ranges.keys() and not self._hides(node):
            self._define(node)
            return
        for child in node.children:
            self._hoist(child, seen)

    def _hides(self, node: Node) -> bool:
        number = self.identities.of(node)
        if number not in self._hiding:
            self._hiding[number] = number in self.opaque or any(self._hides(c) for c in node.children)
        return self._hiding[number]

    # -- text --------------------------------------------------------------------------------------------------

    def text(self, node: Node) -> str:
        """An expression for a node; prints the statements that it needs first."""
        number = self.identities.of(node)
        if number in self.names:
            return self.names[number]
        if isinstance(node, Const):
            return literal(node.value, node.dtype)
        if isinstance(node, Reduce | Dot) or (self.uses[number] > 1 and not isinstance(node, Index)):
            return self._define(node)
        return self._expression(node)

    def _define(self, node: Node) -> str:
        """Print a variable for the node and give its name."""
        if isinstance(node, Reduce | Dot):
            name = self._reduction(node)
        else:
            value = self._expression(node)
            name = self.writer.fresh("s")
            self.writer.line(f"const {scalar(node.dtype)} {name} = {value};")
        self.names[self.identities.of(node)] = name
        return name

    def _expression(self, node: Node) -> str:
        match node:
            case Load():
                return self._load(node)
            case Const(value=value):
                return literal(value, node.dtype)
            case Index(expr=expr):
                return f"{scalar(node.dtype)}({print_index(expr)})"
            case Apply(op=op, args=args):
                return print_op(op, node.dtype, args[-1].dtype, [self.text(a) for a in args])
        raise TypeError(type(node).__name__)

    def _load(self, node: Load) -> str:
        index, ranges = node.index, self.ranges
        for symbol, picked in node.indirect:
            position = self.text(picked)
            name = sym(self.writer.fresh("at"))
            self.writer.line(f"const long {name} = {position};")
            index = tuple(e.xreplace({symbol: name}) for e in index)
        return load(node.value.dtype, self.kernel.address(node.value, index, ranges))

    # -- reductions --------------------------------------------------------------------------------------------

    def _reduction(self, node: Reduce | Dot) -> str:
        """A reduction as loops around its body, the innermost one vectorised."""
        axes, kind, bodies = parts(node)
        name = self.writer.fresh("r")
        self.writer.line(f"{scalar(node.dtype)} {name} = {initial(kind, node.dtype)};")
        self._loops(axes, kind, bodies, name, node)
        return name

    def _loops(self, axes: Sequence[Axis], kind: str, bodies: Sequence[Node], name: str, node: Node) -> None:
        if not axes:
            value = " * ".join(self.text(b) for b in bodies)
            self.writer.line(f"{name} = {combine(kind, node.dtype, name, value)};")
            return
        axis, *inner = axes
        if inner:
            with self.writer.block(for_header(axis)), self.scope([axis]):
                self.hoist(bodies)
                self._loops(inner, kind, bodies, name, node)
            return
        self.hoist(bodies)
        simd = not self.in_simd and not any(nested(b, axis.symbol) for b in bodies)
        with in_blocks(self.writer, axis, kind, node, name) as (header, partial):
            if simd:
                self.writer.pragma(f"omp simd reduction({simd_reduction(kind, node.dtype)} : {partial})")
            with self.writer.block(header), self.scope([axis], simd):
                self._loops([], kind, bodies, partial, node)


def parts(node: Reduce | Dot) -> tuple[tuple[Axis, ...], str, tuple[Node, ...]]:
    """Axes, kind and factors of a reduction; a dot product sums the product of two."""
    if isinstance(node, Reduce):
        return node.axes, node.kind, (node.body,)
    return (node.axis,), "sum", (node.a, node.b)


@lru_cache(maxsize=65536)
def nested(node: Node, symbol: sympy.Symbol) -> bool:
    """Whether a reduction that varies with the symbol lies in or below the node."""
    varies = isinstance(node, Reduce | Dot) and symbol in free_symbols(node)
    return varies or any(nested(c, symbol) for c in node.children)


@contextmanager
def in_blocks(writer: Writer, axis: Axis, kind: str, node: Node, name: str) -> Iterator[tuple[str, str]]:
    """Sum a long axis in blocks, since the error of a float32 sum grows with the number of terms in a row.

    Gives the header of the loop over the axis and the variable to accumulate in.
    """
    extent = axis.extent
    if kind != "sum" or scalar(node.dtype) != "float" or (extent.is_Integer and extent <= 2 * SUM_BLOCK):
        yield for_header(axis), name
        return
    partial, block = writer.fresh("partial"), writer.fresh("block")
    with writer.block(f"for (long {block} = 0; {block} < {print_index(extent)}; {block} += {SUM_BLOCK})"):
        writer.line(f"const long stop = std::min<long>({block} + {SUM_BLOCK}, {print_index(extent)});")
        writer.line(f"float {partial} = 0.0f;")
        yield f"for (long {axis.symbol} = {block}; {axis.symbol} < stop; {axis.symbol}++)", partial
        writer.line(f"{name} += {partial};")


def for_header(axis: Axis) -> str:
    return f"for (long {axis.symbol} = 0; {axis.symbol} < {print_index(axis.extent)}; {axis.symbol}++)"
