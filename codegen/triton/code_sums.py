"""Products of few rows with weights that are stored as codes, w = scale * code + minimum, where rows are int8 too: four
products of small integers are then one instruction, dp4a, and codes need no conversion. Of a unit of columns, with
a[k] = step * byte[k]:

    sum over k of a[k] * w[k] = step * scale * (sum of byte[k] * code[k]) + minimum * step * (sum of byte[k])

whose sums are exact. (llama.cpp multiplies quantised weights so, too; its Q8_1 are such bytes.) A unit is 16 bytes of
codes, which one thread loads at once and sums up by itself, so that a sum takes one register. For that, rows and
columns of the result are printed one by one; where a program has more than so many sums, its columns are a block, which
Triton spreads as it likes.

A single row is rounded as it is multiplied (a matmul's ``activation_group``), by each thread what its units need. Where
an iteration has all columns of the weights, they are loaded before the kernel waits for the one that makes the row:
what is left to do then is arithmetic, and memory is busy in the meantime. Several rows have been rounded before (the
pass ``round_rows``), and share each load of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sympy import Expr, Integer, Symbol

from tilewright.ir.loops import Dot, Load, Node, Reduce
from tilewright.ir.quantization import INT8_LARGEST
from tilewright.ir.types import DType

from .code_columns import Neighbour, Row, product_of_pairs
from .codes import GROUP, PLACE, UNIT, Codes, GroupLoop, Weight, bytes_of, integer_unit, weight_of
from .expression import Block, Context, Operand, flatten
from .product import M, N, ProductPrinter, index_range
from .row_loops import HINTS, K
from .text import Scope, print_index

MOST_SUMS = 16
"""Sums of a program that are printed one by one."""
WORDS = UNIT // 4
"""Of four bytes, as dp4a takes them."""


def code_sums(printer: ProductPrinter, reduces: Sequence[Reduce] = ()) -> CodeSums | None:
    """How a product sums its codes and these reductions of its single row; None where they have no such form."""
    form, unit, tile = printer.form, integer_unit(printer.form), printer.tile
    if unit is None or (form.rows and (tile.transposed or tile.block_m < int(printer.rows))):
        return None
    weights = {dot: weight for dot in form.dots if (weight := weight_of(dot.b)) is not None}
    stored = {dot: found[0] for dot, w in weights.items() if (found := bytes_of(w.code)) is not None}
    shared = tuple(r for r in reduces if r.kind == "sum" and r.dtype is DType.f32)
    return CodeSums(printer, unit, weights, stored, shared)


@dataclass(frozen=True)
class _Row:
    """Names of what units of a row are. words: their bytes, those that belong to each half of the weights' bytes. step:
    what a byte counts. total: the sum of a unit's elements."""

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

    def emit(self, pid: str, n: Block) -> None:
        """Bind the dots of the columns ``n`` of tile ``pid``, and the reductions."""
        base, context = self.printer.base, self.printer.context
        columns, groups = self._columns(pid), self._groups()
        height = self.printer.block_n if len(columns) < self.printer.tile.block_n else "1"
        totals = {r: self._zeros(HINTS[r.kind], f"[1, {groups.block_g}, 1]") for r in self.reduces}
        shape = f"[{height}, {groups.block_g}, 1]"
        sums = {
            dot: [[self._zeros("acc", shape) for _ in columns] for _ in range(self.rows)]
            for dot in self.weights
        }
        rows = self._rows(groups)
        for reduce, name in totals.items():
            for half in range(self.unit.halves):
                self._reduce(reduce, name, half, groups)
        for number, column in enumerate(self._neighbours(columns, groups)):
            for dot, names in sums.items():
                words = self._words(dot, column, groups)
                for row, of_row in zip(rows, names, strict=True):
                    self._add(of_row[number], dot, words, column, row, groups)
        groups.end(base)
        for dot, names in sums.items():
            text = self._joined(names, groups.block_g)
            context.bound[dot] = Operand(self._scaled(self.weights[dot], text, n), base)
        for reduce, name in totals.items():
            total = base.bind(f"tl.sum(tl.sum(tl.sum({name}, axis=2), axis=1), axis=0)", name)
            context.bound[reduce] = Operand(total, base)

    @property
    def rows(self) -> int:
        """Rows that a program multiplies."""
        return int(self.printer.rows) if self.printer.form.rows else 1

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

    def _rows(self, groups: GroupLoop) -> list[_Row]:
        stored = weight_of(self.printer.form.a)
        if stored is None:
            return [self._rounded_row(groups)]
        return [self._stored_row(stored, number, groups) for number in range(self.rows)]

    def _stored_row(self, row: Weight, number: int, groups: GroupLoop) -> _Row:
        """Load a row that is int8 in memory."""
        scope, code = groups.scope, row.code
        assert isinstance(code, Load)
        axes = {s: e.xreplace({M: Integer(number)}) for s, e in self.printer.row_axes.items()}
        words, first = [], self.unit.group * GROUP + PLACE
        for half in range(self.unit.halves):
            at = self._row({**axes, self.printer.form.k.symbol: first + UNIT * half}, groups)
            loaded = at.load(code, convert=False).text
            words.append(scope.bind(f"words_of({loaded}, {groups.block_g}, {WORDS})", "row"))
        if len(words) > 1:
            low, high = (scope.names.fresh(hint) for hint in ("row_low", "row_high"))
            scope.line(f"{low}, {high} = by_half({', '.join(words)}, {groups.block_g})")
            words = [low, high]
        step = self._row({**axes, self.printer.form.k.symbol: first}, groups).named(row.scale).text
        return self._summed(words, step, groups)

    def _rounded_row(self, groups: GroupLoop) -> _Row:
        """Round the only row."""
        scope = groups.scope
        halves = [self._elements(half, groups) for half in range(self.unit.halves)]
        largest = [scope.bind(f"largest_of({a})", "largest") for a in halves]
        if len(halves) > 1:
            largest = [scope.bind(f"larger({largest[0]}, {largest[1]})", "largest")]
        inverse = scope.bind(f"tl.where({largest[0]} > 0, {INT8_LARGEST}.0 / {largest[0]}, 0.0)", "inverse")
        step = scope.bind(f"{largest[0]} * {1 / INT8_LARGEST!r}", "step")
        words = [
            scope.bind(f"rounded_words({a}, {inverse}, {groups.block_g}, {WORDS})", "row") for a in halves
        ]
        return self._summed(words, step, groups)

    def _summed(self, words: Sequence[str], step: str, groups: GroupLoop) -> _Row:
        """The row of these words, with its sum where weights have minima."""
        total = ""
        if any(weight.minimum is not None for weight in self.weights.values()):
            total = groups.scope.bind(" + ".join(_sum(f"sum_bytes({w})") for w in words), "bytes")
            total = groups.scope.bind(f"{total}.to(tl.float32) * {step}", "total")
        return _Row(tuple(words), step, total)

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

    def _words(self, dot: Dot, column: Context, groups: GroupLoop) -> tuple[str, ...]:
        """The codes of a column, a word for each of the row's."""
        scope = groups.scope
        loaded = column.load(self.codes[dot], convert=False).text
        words = scope.bind(f"words_of({loaded}, {groups.block_g}, {WORDS})", "words")
        if self.unit.halves == 1:
            return (words,)
        shifts = ("", " >> 4")
        return tuple(scope.bind(f"({words}{shift}) & 0x0F0F0F0F", "codes") for shift in shifts)

    def _add(
        self, name: str, dot: Dot, words: tuple[str, ...], column: Context, row: _Row, groups: GroupLoop
    ) -> None:
        """Add the products of the units of one iteration."""
        weight, scope = self.weights[dot], groups.scope
        helper = "dot_bytes" if self.unit.halves == 1 else "dot_halves"
        part = scope.bind(_sum(f"{helper}({', '.join((*words, *row.words))})"), "part")
        factor = row.step
        if not self._is_scaled_once(weight):
            factor = f"({row.step} * {column.named(weight.scale).text})"
        text = f"{part}.to(tl.float32) * {factor}"
        if weight.minimum is not None:
            text += f" + {row.total} * {column.named(weight.minimum).text}"
        scope.line(f"{name} += {text}")

    def _joined(self, names: Sequence[Sequence[str]], units: str) -> str:
        """The sums of all columns, of several rows as a block of rows x columns, folded together: warps then wait for
        each other once."""
        base, tile, block_n = self.printer.base, self.printer.tile, self.printer.block_n
        if not self.printer.form.rows:
            return self._folded(names[0], units)
        # Rows up to the tile's height, beyond the last, are not stored.
        rows = [names[number % len(names)] for number in range(tile.block_m)]
        if len(names[0]) == tile.block_n:
            flat = self._folded([name for row in rows for name in row], units)
            return base.bind(f"tl.reshape({flat}, [{tile.block_m}, {block_n}])", "dot")
        joined = _join([self._folded(row, units) for row in rows], base)
        return base.bind(f"tl.trans(tl.reshape({joined}, [{block_n}, {tile.block_m}]))", "dot")

    def _folded(self, names: Sequence[str], units: str) -> str:
        """Sums of units, each [1, G, 1], as one block of their totals; of a block of columns [N, G, 1], theirs."""
        base = self.printer.base
        if len(names) == 1:
            return base.bind(f"tl.sum(tl.sum({names[0]}, axis=2), axis=1)", "dot")
        return base.bind(f"tl.sum(tl.reshape({_join(names, base)}, [{units}, {len(names)}]), axis=0)", "dot")

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


def _join(names: Sequence[str], base: Scope) -> str:
    """Blocks side by side along a last axis (of twos), in their order."""
    joined = list(names)
    while len(joined) > 1:
        pairs = zip(joined[: len(joined) // 2], joined[len(joined) // 2 :], strict=True)
        joined = [base.bind(f"tl.join({a}, {b})", "sums") for a, b in pairs]
    return joined[0]


def _sum(text: str) -> str:
    """The sum of each unit, which stays in its thread."""
    return f"tl.sum({text}, axis=2, keep_dims=True)"
