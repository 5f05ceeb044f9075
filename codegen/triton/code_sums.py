"""Products of a single row with weights that are stored as codes, w = scale * code + minimum, where runs of the row may
be rounded to int8 (a matmul's ``activation_group``): four products of small integers are then one instruction, dp4a,
and codes need no conversion. Of a unit of columns, with a[k] = step * byte[k]:

    sum over k of a[k] * w[k] = step * scale * (sum of byte[k] * code[k]) + minimum * step * (sum of byte[k])

whose sums are exact. (llama.cpp multiplies quantised weights so, too; its Q8_1 are such bytes.) A unit is 16 bytes of
codes, which one thread loads at once and sums up by itself, so that a sum takes one register; and each thread rounds
the elements of the row that its units need. For that, columns of the result are printed one by one; where a program has
more than so many sums, its columns are a block, which Triton spreads as it likes.

Where an iteration has all columns of the weights, they are loaded before the kernel waits for the one that makes the
row: what is left to do then is arithmetic, and memory is busy in the meantime.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sympy import Expr, Symbol

from tilewright.ir.loops import Dot, Load, Node, Reduce
from tilewright.ir.quantization import INT8_LARGEST
from tilewright.ir.types import DType

from .code_columns import Neighbour, Row, product_of_pairs
from .codes import GROUP, PLACE, UNIT, Codes, GroupLoop, Weight, bytes_of, unit_of, weight_of
from .expression import Block, Context, Operand, flatten
from .product import N, ProductPrinter, index_range
from .row_loops import HINTS, K
from .text import print_index

MOST_SUMS = 16
"""Sums of a program that are printed one by one."""
WORDS = UNIT // 4
"""Of four bytes, as dp4a takes them."""


def code_sums(printer: ProductPrinter, reduces: Sequence[Reduce]) -> CodeSums | None:
    """How a product of one row sums its codes and these reductions of the row; None where they have no such form."""
    form = printer.form
    unit = unit_of(form)
    weights = {dot: weight for dot in form.dots if (weight := weight_of(dot.b)) is not None}
    if unit is None or len(weights) < len(form.dots):
        return None
    if not all(d.activation_group and d.activation_group % unit.group == 0 for d in form.dots):
        return None
    stored = {dot: found for dot, weight in weights.items() if (found := bytes_of(weight.code)) is not None}
    if len(stored) < len(weights) or any(
        (shift is None) != (unit.halves == 1) for _, shift in stored.values()
    ):
        return None
    shared = tuple(r for r in reduces if r.kind == "sum" and r.dtype is DType.f32)
    return CodeSums(printer, unit, weights, {dot: load for dot, (load, _) in stored.items()}, shared)


@dataclass(frozen=True)
class _RoundedRow:
    """Names of what units of a row were rounded to. words: those that belong to each half of the weights' bytes. step:
    what a byte counts. total: the sum of a unit's rounded elements."""

    words: tuple[str, ...]
    step: str
    total: str


@dataclass(frozen=True)
class CodeSums:
    """Prints the loop. ``codes``: the bytes of each weight. ``reduces``: the reductions of the row that share it."""

    printer: ProductPrinter
    unit: Codes
    weights: dict[Dot, Weight]
    codes: dict[Dot, Load]
    reduces: tuple[Reduce, ...]

    @property
    def whole(self) -> bool:
        """Whether an iteration has all columns of the weights."""
        extent = self.printer.form.k.extent
        return bool(extent.is_Integer) and int(extent) <= self.printer.tile.block_k

    def load(self, pid: str) -> None:
        """Load the weights of tile ``pid``, where they are ``whole``; not what a kernel may be writing still."""
        constants = self.printer.context.pointers.constants
        for column in self._neighbours(self._columns(pid), self._groups()):
            for dot, weight in self.weights.items():
                factors = () if self._is_scaled_once(weight) else (weight.scale, weight.minimum)
                for load in (self.codes[dot], *(n for f in factors if f is not None for n in _loads(f))):
                    if load.value in constants:
                        column.load(load, convert=False)

    def emit(self, pid: str) -> None:
        """Bind the dots of the columns of tile ``pid``, and the reductions."""
        printer, base, context = self.printer, self.printer.base, self.printer.context
        columns, groups = self._columns(pid), self._groups()
        height = printer.block_n if len(columns) < printer.tile.block_n else "1"
        sums = {
            dot: [self._zeros("acc", f"[{height}, {groups.block_g}, 1]") for _ in columns]
            for dot in self.weights
        }
        totals = {r: self._zeros(HINTS[r.kind], f"[1, {groups.block_g}, 1]") for r in self.reduces}
        row = self._rounded_row(groups)
        for reduce, name in totals.items():
            for half in range(self.unit.halves):
                self._reduce(reduce, name, half, groups)
        for number, column in enumerate(self._neighbours(columns, groups)):
            for dot, names in sums.items():
                self._add(names[number], dot, column, row, groups)
        groups.end(base)
        n = index_range(base, "n", pid, printer.block_n, printer.tile.block_n, printer.columns, "")
        for dot, names in sums.items():
            context.bound[dot] = Operand(
                self._scaled(self.weights[dot], self._joined(names, groups.block_g), n), base
            )
        for reduce, name in totals.items():
            total = base.bind(f"tl.sum(tl.sum(tl.sum({name}, axis=2), axis=1), axis=0)", name)
            context.bound[reduce] = Operand(total, base)

    def _groups(self) -> GroupLoop:
        printer, tile = self.printer, self.printer.tile
        return GroupLoop.begin(
            printer.base, self.unit, printer.form.k.extent, tile.block_k, tile.num_stages, self.whole
        )

    def _zeros(self, hint: str, shape: str) -> str:
        name = self.printer.base.names.fresh(hint)
        self.printer.base.line(f"{name} = tl.zeros({shape}, tl.float32)")
        return name

    def _columns(self, pid: str) -> list[Block]:
        """The columns of a tile, each by itself; or all as one block."""
        printer = self.printer
        base, size = printer.base, printer.tile.block_n
        if size * len(self.weights) > MOST_SUMS:
            return [index_range(base, "nc", pid, printer.block_n, size, printer.columns, "[:, None, None]")]
        even = printer.columns.is_Integer and int(printer.columns) % size == 0
        columns = []
        for number in range(size):
            text = f"({pid} * {printer.block_n} + {number} + tl.arange(0, 1))[:, None, None]"
            text = base.bind(text, "column")
            mask = "" if even else base.bind(f"{text} < {print_index(printer.columns)}", f"{text}_ok")
            columns.append(Block(text, mask, base, printer.columns))
        return columns

    def _rounded_row(self, groups: GroupLoop) -> _RoundedRow:
        scope = groups.scope
        halves = [self._elements(half, groups) for half in range(self.unit.halves)]
        largest = [scope.bind(f"largest_of({a})", "largest") for a in halves]
        if len(halves) > 1:
            largest = [scope.bind(f"larger({largest[0]}, {largest[1]})", "largest")]
        inverse = scope.bind(f"tl.where({largest[0]} > 0, {INT8_LARGEST}.0 / {largest[0]}, 0.0)", "inverse")
        step = scope.bind(f"{largest[0]} * {1 / INT8_LARGEST!r}", "step")
        words = tuple(
            scope.bind(f"rounded_words({a}, {inverse}, {groups.block_g}, {WORDS})", "row") for a in halves
        )
        total = scope.bind(" + ".join(_sum(f"sum_bytes({w})") for w in words), "bytes")
        return _RoundedRow(words, step, f"{total}.to(tl.float32) * {step}")

    def _row(self, axes: Mapping[Symbol, Expr], groups: GroupLoop) -> Context:
        context = self.printer.context
        row = Row(context.base, context.pointers, context.axes, context.blocks, context.shared, context.bound)
        return row.extended(axes, groups.blocks)

    def _elements(self, half: int, groups: GroupLoop) -> str:
        """The row's elements that belong to a half of each byte, in float32 and zero beyond the last."""
        a, operand = self.printer.form.a, self.printer.operand
        row = self._row({self.printer.form.k.symbol: self.unit.column(half)}, groups)
        value = product_of_pairs(row, a) or row.operand(a, operand)
        value = row.shaped(value, a, (GROUP, PLACE), groups.shape("1"), "a")
        text = f"widen({value.text})" if operand is DType.bf16 else f"{value.text}.to(tl.float32)"
        text = value.scope.bind(text, "a")
        mask = groups.blocks[GROUP].mask
        if mask and not isinstance(a, Load):
            text = groups.scope.bind(f"tl.where({mask}, {text}, 0.0)", "a")
        return text

    def _reduce(self, reduce: Reduce, name: str, half: int, groups: GroupLoop) -> None:
        digits, _ = flatten(reduce.axes, K)
        axes = {s: e.xreplace({K: self.unit.column(half)}) for s, e in digits.items()}
        row = self._row(axes, groups)
        value = row.shaped(row.named(reduce.body), reduce.body, (GROUP, PLACE), groups.shape("1"))
        mask = groups.blocks[GROUP].mask
        text = groups.scope.bind(f"tl.where({mask}, {value.text}, 0.0)") if mask else value.text
        groups.scope.line(f"{name} += {_sum(text)}")

    def _neighbours(self, columns: Sequence[Block], groups: GroupLoop) -> Iterator[Context]:
        """What reads the weights of each column. (Both halves of a byte share their factors.)"""
        axes = {**self.printer.column_axes, self.printer.form.k.symbol: self.unit.column(0)}
        first = self.printer.context.extended(axes, {**groups.blocks, N: columns[0]})
        addresses: dict[Load, str] = {}
        for number, n in enumerate(columns):
            blocks, width = {**first.blocks, N: n}, self.printer.tile.block_n
            yield Neighbour(
                first.base, first.pointers, first.axes, blocks, first.shared, first.bound,
                first=first, distance=number, width=width, addresses=addresses,
            )  # fmt: skip

    def _add(self, name: str, dot: Dot, column: Context, row: _RoundedRow, groups: GroupLoop) -> None:
        """Add the products of the units of one iteration."""
        weight, scope = self.weights[dot], groups.scope
        loaded = column.load(self.codes[dot], convert=False).text
        words = scope.bind(f"words_of({loaded}, {groups.block_g}, {WORDS})", "words")
        helper = "dot_bytes" if self.unit.halves == 1 else "dot_nibbles"
        part = scope.bind(_sum(f"{helper}({words}, {', '.join(row.words)})"), "part")
        factor = row.step
        if not self._is_scaled_once(weight):
            factor = f"({row.step} * {column.named(weight.scale).text})"
        text = f"{part}.to(tl.float32) * {factor}"
        if weight.minimum is not None:
            text += f" + {scope.bind(row.total, 'total')} * {column.named(weight.minimum).text}"
        scope.line(f"{name} += {text}")

    def _joined(self, names: Sequence[str], units: str) -> str:
        """The sums of all columns as one block, folded together: warps then wait for each other once."""
        base = self.printer.base
        if len(names) == 1:
            return base.bind(f"tl.sum(tl.sum({names[0]}, axis=2), axis=1)", "dot")
        joined = list(names)
        while len(joined) > 1:
            pairs = zip(joined[: len(joined) // 2], joined[len(joined) // 2 :], strict=True)
            joined = [base.bind(f"tl.join({a}, {b})", "sums") for a, b in pairs]
        return base.bind(f"tl.sum(tl.reshape({joined[0]}, [{units}, {len(names)}]), axis=0)", "dot")

    def _is_scaled_once(self, weight: Weight) -> bool:
        return weight.is_scaled_once(self.printer.form.k.symbol)

    def _scaled(self, weight: Weight, text: str, n: Block) -> str:
        if not self._is_scaled_once(weight):
            return text
        column = self.printer.context.extended(self.printer.column_axes, {N: n})
        return self.printer.base.bind(f"{text} * {column.named(weight.scale).text}", "dot")


def _loads(node: Node) -> list[Load]:
    """What is loaded for a node, in the order in which it is used."""
    inner = [load for child in node.children for load in _loads(child)]
    return [*inner, node] if isinstance(node, Load) else inner


def _sum(text: str) -> str:
    """The sum of each unit, which stays in its thread."""
    return f"tl.sum({text}, axis=2, keep_dims=True)"
