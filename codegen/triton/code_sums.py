"""Products of a single row with weights that are stored as codes, w = scale * code + minimum. Factors of a group of
columns leave its sum, and so does what ``unpack`` adds to a code:

    sum over k of a[k] * w[k] = scale * (sum of a[k] * (code[k] + bias) - bias * sum of a[k]) + minimum * sum of a[k]

Codes are walked in units of up to 16 bytes, each of which one thread loads at once and sums up by itself, so that a sum
takes one register, and the row's elements are where they are needed. For that, columns of the result are printed one by
one; where a program has more than so many sums, its columns are a block, which Triton spreads as it likes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
from sympy import Expr, Symbol

from tilewright.ir.index import linear_index, simplify, sym
from tilewright.ir.loops import Apply, Dot, Load, Node, Reduce
from tilewright.ir.types import DType

from .codes import GROUP, PLACE, Codes, GroupLoop, Weight, unit_of, unpacked, weight_of, whole_weight
from .expression import Block, Context, Operand, flatten
from .product import N, ProductPrinter, index_range
from .row_loops import HINTS, K
from .text import Scope, deepest, print_index

MOST_SUMS = 16
"""Sums of a program that are printed one by one."""


def code_sums(printer: ProductPrinter, reduces: Sequence[Reduce]) -> CodeSums | None:
    """How a product of one row sums its codes and these reductions of the row; None where they have no such form."""
    form, tile = printer.form, printer.tile
    found = {dot: weight for dot in form.dots if (weight := weight_of(dot.b)) is not None}
    unit = unit_of(form, tile.block_k // (32 * tile.num_warps))
    if unit is None or len(found) < len(form.dots):
        return None
    shared = tuple(r for r in reduces if r.kind == "sum" and r.dtype is DType.f32)
    return CodeSums(printer, unit, found, shared)


class _Row(Context):
    """Vectors in bfloat16 are widened two elements at a time."""

    def load(self, node: Load, convert: bool) -> Operand:
        if not convert or node.dtype is not DType.bf16 or PLACE not in self.varies(node):
            return super().load(node, convert)
        value = super().load(node, convert=False)
        return Operand(value.scope.bind(f"widen({value.text})", value.text), value.scope)


@dataclass
class _Neighbour(Context):
    """A column that is ``distance`` behind the ``first`` of a tile of ``width``. Where the way to it in memory is
    known, its addresses are the first's and a number, which costs no instruction."""

    first: Context | None = None
    distance: int = 0
    width: int = 1
    addresses: dict[Load, str] = field(default_factory=dict)
    """Variables of the first's addresses, shared by its neighbours."""

    def address(self, node: Load) -> tuple[str, str, Scope]:
        apart = self._apart(node)
        if apart is None or self.first is None:
            return super().address(node)
        text, _, scope = self.first.address(node)
        if node not in self.addresses:
            self.addresses[node] = scope.bind(text, "at")
        at = self.addresses[node]
        return f"{at} + {apart}" if apart else at, self._mask(node), scope

    def _apart(self, node: Load) -> int | None:
        """Elements from the first column's to this one's, if that is the same for all tiles."""
        if node.indirect:
            return None
        index = self.over_blocks(linear_index(node.index, self.pointers.shape(node.value)))
        tile, extents = sym("tile"), {s: b.extent for s, b in self.blocks.items()}
        extents |= {tile: sympy.ceiling(extents[N] / self.width)}
        places = [simplify(index.xreplace({N: self.width * tile + d}), extents) for d in (self.distance, 0)]
        apart = sympy.expand(places[0] - places[1])
        return int(apart) if apart.is_Integer else None


@dataclass(frozen=True)
class CodeSums:
    """Prints the loop. ``reduces`` are the reductions of the row that share it."""

    printer: ProductPrinter
    unit: Codes
    weights: dict[Dot, Weight]
    reduces: tuple[Reduce, ...]

    def emit(self, pid: str) -> None:
        """Bind the dots of the columns of tile ``pid``, and the reductions."""
        printer, base, context = self.printer, self.printer.base, self.printer.context
        columns = self._columns(pid)
        tile = printer.tile
        groups = GroupLoop.begin(base, self.unit, printer.form.k.extent, tile.block_k, tile.num_stages)
        height = printer.block_n if len(columns) < tile.block_n else "1"
        sums = {
            dot: [self._zeros("acc", f"[{height}, {groups.block_g}, 1]") for _ in columns]
            for dot in self.weights
        }
        totals = {r: self._zeros(HINTS[r.kind], f"[1, {groups.block_g}, 1]") for r in self.reduces}
        row = [self._elements(half, groups) for half in range(self.unit.halves)]
        for reduce, name in totals.items():
            for half in range(self.unit.halves):
                self._reduce(reduce, name, half, groups)
        firsts = [self._column(columns[0], half, groups) for half in range(self.unit.halves)]
        addresses: list[dict[Load, str]] = [{} for _ in firsts]
        for number, n in enumerate(columns):
            column = [
                self._neighbour(first, number, n, known)
                for first, known in zip(firsts, addresses, strict=True)
            ]
            for dot, names in sums.items():
                self._add(names[number], self.weights[dot], column, row, groups)
        base.close(groups.scope)
        n = index_range(base, "n", pid, printer.block_n, printer.tile.block_n, printer.columns, "")
        for dot, names in sums.items():
            context.bound[dot] = Operand(
                self._scaled(self.weights[dot], self._joined(names, groups.block_g), n), base
            )
        for reduce, name in totals.items():
            total = base.bind(f"tl.sum(tl.sum(tl.sum({name}, axis=2), axis=1), axis=0)", name)
            context.bound[reduce] = Operand(total, base)

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

    def _row(self, axes: Mapping[Symbol, Expr], groups: GroupLoop) -> Context:
        context = self.printer.context
        row = _Row(
            context.base, context.pointers, context.axes, context.blocks, context.shared, context.bound
        )
        return row.extended(axes, groups.blocks)

    def _elements(self, half: int, groups: GroupLoop) -> str:
        """The row's elements that belong to a half of each byte, in float32 and zero beyond the last."""
        a, operand = self.printer.form.a, self.printer.operand
        row = self._row({self.printer.form.k.symbol: self.unit.column(half)}, groups)
        value = _pairs(row, a) or row.operand(a, operand)
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

    def _column(self, n: Block, half: int, groups: GroupLoop) -> Context:
        axes = {**self.printer.column_axes, self.printer.form.k.symbol: self.unit.column(half)}
        return self.printer.context.extended(axes, {**groups.blocks, N: n})

    def _neighbour(self, first: Context, distance: int, n: Block, addresses: dict[Load, str]) -> Context:
        blocks, width = {**first.blocks, N: n}, self.printer.tile.block_n
        return _Neighbour(
            first.base, first.pointers, first.axes, blocks, first.shared, first.bound,
            first=first, distance=distance, width=width, addresses=addresses,
        )  # fmt: skip

    def _add(
        self, name: str, weight: Weight, columns: Sequence[Context], row: Sequence[str], groups: GroupLoop
    ) -> None:
        """Add the products of the groups of one iteration. ``columns``: what belongs to each half of the bytes."""
        printer, scope = self.printer, groups.scope
        # A row in float32 would show what is rounded off when its products with codes and minima cancel.
        apart = weight.minimum is None or printer.operand is not DType.f32
        terms, bias = [], 0
        for column, a in zip(columns, row, strict=True):
            if not apart:
                terms.append(_sum(f"{a} * {whole_weight(column, weight, DType.f32)}"))
                continue
            code, bias = unpacked(column, weight.code)
            terms.append(_sum(f"{a} * {code}"))
        text = scope.bind(" + ".join(terms), "part")
        if apart:
            text = self._with_factors(columns[0], weight, text, bias, row)
        scope.line(f"{name} += {text}")

    def _with_factors(self, column: Context, weight: Weight, text: str, bias: int, row: Sequence[str]) -> str:
        """The sums of a row's products with codes, ``text``, as those with weights."""
        scope = column.blocks[GROUP].scope
        if bias or weight.minimum is not None:
            whole = scope.bind(" + ".join(map(_sum, row)), "whole")
            text = scope.bind(f"{text} - {whole} * {float(bias)}", "part") if bias else text
        if not weight.is_scaled_once(self.printer.form.k.symbol):
            text = f"{text} * {column.named(weight.scale).text}"
        return text if weight.minimum is None else f"{text} + {whole} * {column.named(weight.minimum).text}"

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

    def _scaled(self, weight: Weight, text: str, n: Block) -> str:
        if not weight.is_scaled_once(self.printer.form.k.symbol):
            return text
        column = self.printer.context.extended(self.printer.column_axes, {N: n})
        return self.printer.base.bind(f"{text} * {column.named(weight.scale).text}", "dot")


def _sum(text: str) -> str:
    """The sum of each unit, which stays in its thread."""
    return f"tl.sum({text}, axis=2, keep_dims=True)"


def _pairs(row: Context, a: Node) -> Operand | None:
    """A product of two vectors in bfloat16, two elements at a time; None where ``a`` is something else."""
    match a:
        case Apply(
            dtype=DType.bf16, op="mul", args=(Load(dtype=DType.bf16) as x, Load(dtype=DType.bf16) as y)
        ):
            if x in row.bound or y in row.bound or not all(PLACE in row.varies(n) for n in (x, y)):
                return None
            left, right = row.load(x, convert=False), row.load(y, convert=False)
            scope = deepest((left.scope, right.scope))
            return Operand(scope.bind(f"multiply_pairs({left.text}, {right.text})", "a"), scope)
    return None
