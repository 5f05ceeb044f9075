"""Scalar expressions, iteration spaces, and the loop form of a kernel made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import sympy
from sympy import Expr

from ..module import Attr
from ..types import DType, Value


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
    """The sum over ``axis`` of ``a * b``, accumulated in float32 (float64 for f64).

    ``activation_group`` (0: none): runs of so many values of ``a``, or equal parts of them, may be rounded to int8,
    each with its own scale."""

    a: Node
    b: Node
    axis: Axis
    activation_group: int = 0

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
            yield from post_order(store.value, seen)


@dataclass(frozen=True)
class Loops:
    """A kernel as segments; all read ``inputs`` and together write ``outputs`` once."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    segments: tuple[Segment, ...]

    def __str__(self) -> str:
        from .text import print_loops

        return print_loops(self)


def post_order(node: Node, seen: set[Node]) -> Iterator[Node]:
    """The node and all below it that are not in ``seen``, children before parents."""
    if node in seen:
        return
    seen.add(node)
    for child in node.children:
        yield from post_order(child, seen)
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
