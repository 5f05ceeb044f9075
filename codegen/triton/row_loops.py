"""Loops over a reduced axis, shared by the matmul and the reduction template.

Reductions of a row (a sum of squares, a maximum) and dot products that share the row are put into as few loops as their
dependences allow: everything of level n is computed in loop n, where the level of a reduction is one more than the
highest level inside its body. LayerNorm's mean is level 0, its variance level 1; a product with a normalised row comes
after both, while an RMSNorm whose row scale was commuted past the product shares the product's own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import sympy
from sympy import Expr

from tilewright.ir.index import sym
from tilewright.ir.loops import Dot, Node, Reduce, Segment, free_symbols
from tilewright.ir.types import DType

from .expression import Block, Context, Operand, flatten
from .pointwise_ops import TRITON_TYPES, compute_dtype
from .text import Scope, print_index

K = sym("k")
"""The block symbol of the reduced axis."""


def below(node: Node) -> set[Node]:
    """A node and everything that it is computed from."""
    return {node}.union(*(below(child) for child in node.children))


@dataclass(frozen=True)
class Stage:
    """Reductions (and perhaps the segment's dots) over axes of one flat ``extent`` that share a loop."""

    extent: Expr
    reduces: tuple[Reduce, ...]
    dots: tuple[Dot, ...] = ()


def reductions(nodes: Iterable[Node]) -> tuple[Reduce, ...]:
    """The Reduce nodes among ``nodes``, children before parents."""
    return tuple(n for n in nodes if isinstance(n, Reduce))


def plan_stages(
    segment: Segment, rows: frozenset[sympy.Symbol], dots: Sequence[Dot] = ()
) -> tuple[Stage, ...] | None:
    """The loops that a segment needs, in order; None when a reduction is no function of the row alone."""
    levels: dict[Node, int] = {}
    for node in segment.nodes():
        inner = max((levels[c] for c in node.children), default=0)
        if isinstance(node, Dot) and node not in dots:
            return None
        if isinstance(node, Reduce):
            if not free_symbols(node) <= rows:
                return None
            inner += 1
        levels[node] = inner
    last = max((levels[n] for d in dots for n in d.children), default=0)
    groups: dict[tuple[int, Expr], list[Reduce]] = {}
    for reduce in reductions(segment.nodes()):
        _, extent = flatten(reduce.axes, K)
        groups.setdefault((levels[reduce] - 1, extent), []).append(reduce)
    if dots:
        groups.setdefault((last, dots[0].axis.extent), [])
    stages = []
    for (level, extent), found in sorted(groups.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        shares = bool(dots) and level == last and extent == dots[0].axis.extent
        stages.append(Stage(extent, tuple(found), tuple(dots) if shares else ()))
    return tuple(stages)


HINTS = {"sum": "total", "max": "highest", "min": "lowest", "prod": "product", "any": "some", "all": "every"}
"""Names of results, which must not hide Python's own."""

IDENTITY = {"sum": "0", "max": 'float("-inf")', "min": 'float("inf")', "prod": "1", "any": "0", "all": "1"}


def identity(kind: str, dtype: DType) -> str:
    """The neutral element of a reduction."""
    if dtype.is_float:
        return {"0": "0.0", "1": "1.0"}.get(IDENTITY[kind], IDENTITY[kind])
    if kind in ("max", "min") and dtype.is_int:
        bits = 8 * dtype.itemsize
        low, high = (0, 2**bits - 1) if dtype is DType.u8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return f"({low})" if kind == "max" else str(high)
    return (
        IDENTITY[kind] if kind in ("sum", "prod") else {"any": "0", "all": "1", "max": "0", "min": "1"}[kind]
    )


def fold(reduce: Reduce, text: str, axis: int, keep: bool) -> str:
    """A block reduced along an axis."""
    keep_dims = ", keep_dims=True" if keep else ""
    match reduce.kind:
        case "sum":
            return f"tl.sum({text}, axis={axis}{keep_dims})"
        case "max" | "min" if reduce.dtype.is_float:
            return f"{reduce.kind}_of({text}, {axis}{', True' if keep else ''})"
        case "max" | "any":
            return f"tl.max({text}, axis={axis}{keep_dims})"
        case "min" | "all":
            return f"tl.min({text}, axis={axis}{keep_dims})"
    return f"tl.reduce({text}, {axis}, multiply{keep_dims})"


def combine(kind: str, a: str, b: str) -> str:
    """Two partial results merged. As for torch, NaN is the largest number and the smallest."""
    match kind:
        case "sum":
            return f"{a} + {b}"
        case "max" | "any":
            return f"larger({a}, {b})"
        case "min" | "all":
            return f"smaller({a}, {b})"
    return f"{a} * {b}"


def loop_range(extent: Expr, step: str, stages: int) -> str:
    """What a loop runs over. stages: iterations whose loads are under way, copied to shared memory, where no tensor
    core asks for that by itself; below 3, each iteration waits for its own loads in registers."""
    bounds = f"0, {print_index(extent)}, {step}"
    return f"tl.range({bounds}, num_stages={stages})" if stages > 2 else f"range({bounds})"


@dataclass(frozen=True)
class KBlock:
    """The reduced axis in one loop: constant name and size of its block, and how a block of it is shaped."""

    constant: str
    size: int
    extent: Expr

    @property
    def whole(self) -> bool:
        """True when one block covers the axis, so that there is no loop."""
        return bool(self.extent.is_Integer) and int(self.extent) <= self.size

    @property
    def even(self) -> bool:
        """True when every lane of every block is in range."""
        return bool(self.extent.is_Integer) and int(self.extent) % self.size == 0

    def index(self, scope: Scope, start: str, shape: str, hint: str = "k") -> Block:
        """The block of indices that begins at ``start`` ("" for 0), shaped by a subscript such as ``[None, :]``."""
        text = f"tl.arange(0, {self.constant}){shape}"
        name = scope.bind(f"{start} + {text}" if start else text, hint)
        mask = "" if self.even else scope.bind(f"{name} < {print_index(self.extent)}", f"{name}_ok")
        return Block(name, mask, scope, self.extent)


@dataclass
class RowLoop:
    """Accumulators of a loop's reductions over blocks shaped ``full``, folded along ``axis`` when it ends.

    ``wide`` keeps a block per accumulator and folds once, after the loop; otherwise each iteration folds. stages: see
    ``loop_range``, of a loop with dots.
    """

    base: Scope
    full: str
    axis: int
    keep: bool
    folded: str
    wide: bool
    stages: int = 0

    def run(self, stage: Stage, k: KBlock, body: Callable[[Scope, str], Context], context: Context) -> None:
        """Emit a loop. ``body(scope, start)`` adds the products and gives the context of the row."""
        if k.whole:
            row = body(self.base, "")
            for reduce in stage.reduces:
                value = self._value(reduce, row)
                folded = fold(reduce, value, self.axis, self.keep)
                self._finish(reduce, self.base.bind(folded, HINTS[reduce.kind]), context)
            return
        names = {r: self._start(r) for r in stage.reduces}
        steps = loop_range(k.extent, k.constant, self.stages if stage.dots else 0)
        scope = self.base.open(f"for start in {steps}:")
        row = body(scope, "start")
        for reduce, name in names.items():
            value = self._value(reduce, row)
            if not self.wide:
                value = fold(reduce, value, self.axis, self.keep)
            scope.line(f"{name} = {combine(reduce.kind, name, value)}")
        self.base.close(scope)
        for reduce, name in names.items():
            text = self.base.bind(fold(reduce, name, self.axis, self.keep), name) if self.wide else name
            self._finish(reduce, text, context)

    def _start(self, reduce: Reduce) -> str:
        dtype = _accumulator(reduce)
        shape = self.full if self.wide else self.folded
        name = self.base.names.fresh(HINTS[reduce.kind])
        self.base.line(
            f"{name} = tl.full({shape}, {identity(reduce.kind, reduce.dtype)}, {TRITON_TYPES[dtype]})"
        )
        return name

    def _value(self, reduce: Reduce, row: Context) -> str:
        """The reduced expression as a block along the axis, neutral in lanes that are out of range."""
        block = row.blocks[K]
        digits, _ = flatten(reduce.axes, K)
        inner = row.extended(digits, {})
        value = inner.named(reduce.body)
        dtype = _accumulator(reduce)
        text = value.text
        if reduce.dtype is DType.bool:
            text = block.scope.bind(f"tl.cast({text}, {TRITON_TYPES[dtype]})")
        neutral = identity(reduce.kind, reduce.dtype)
        if block.mask:
            return block.scope.bind(f"tl.where({block.mask}, {text}, {neutral})")
        if K in {
            s for e in (digits[s] for s in free_symbols(reduce.body) & set(digits)) for s in e.free_symbols
        }:
            return text
        return block.scope.bind(f"tl.where({block.text} >= 0, {text}, {neutral})")

    def _finish(self, reduce: Reduce, text: str, context: Context) -> None:
        if reduce.dtype is DType.bool:
            text = self.base.bind(f"{text} != 0")
        context.bound[reduce] = Operand(text, self.base)


def _accumulator(reduce: Reduce) -> DType:
    return DType.i32 if reduce.dtype is DType.bool else compute_dtype(reduce.dtype)
