"""Weights that are stored as codes, scale * code + minimum, as both templates for products read them.

They are walked in blocks of [rows of the weight, groups, places]: columns of a group share their factors, which are
thus loaded once. Where two columns share a byte (int4), a sum over k becomes two sums over bytes j,

    sum over k of a[k] * w[k]  =  sum over halves h, bytes j of a[k(j, h)] * w[k(j, h)],   k = 8 (j // 4) + 4 h + j % 4

in which both halves read the same byte: codes are loaded once, in whole vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

from sympy import Expr, Integer, Symbol, prod

from tilewright.ir.index import FloorDiv, Mod, sym
from tilewright.ir.loops import Apply, Const, Index, Load, MatmulForm, Node, free_symbols
from tilewright.ir.types import DType

from .expression import Block, Context
from .row_loops import K, below, loop_range
from .text import Scope, deepest, print_index
from .unpack import CODE_BIAS

GROUP, PLACE = sym("group"), sym("place")
"""Block symbols: a group of columns, and a byte in it."""


@dataclass(frozen=True)
class Codes:
    """Weights in groups of ``group`` columns that share a scale, ``halves`` columns to a byte."""

    group: int
    halves: int

    @property
    def places(self) -> int:
        """Bytes of a group."""
        return self.group // self.halves

    def column(self, half: int) -> Expr:
        """Column k at a GROUP and a PLACE in it."""
        return self.group * GROUP + self._within(PLACE, half)

    def column_of_byte(self, half: int) -> Expr:
        """Column k at a byte K of the row."""
        return self._within(K, half)

    def _within(self, byte: Symbol, half: int) -> Expr:
        if self.halves == 1:
            return byte
        return 8 * FloorDiv(byte, Integer(4)) + 4 * half + Mod(byte, Integer(4))


@dataclass(frozen=True)
class Weight:
    """A weight as ``scale * code + minimum``: nodes of float32, of an integer, and of float32 or None."""

    code: Node
    scale: Node
    minimum: Node | None

    def is_scaled_once(self, k: Symbol) -> bool:
        """Whether its only factor is that of a whole row, and may wait until a sum over k is complete."""
        return self.minimum is None and k not in free_symbols(self.scale)


def weight_of(b: Node) -> Weight | None:
    """What a right operand is made of, where that is a code and its factors."""
    node, minimum = _unrounded(b), None
    if isinstance(node, Apply) and node.op == "add":
        node, minimum = node.args
    if not (isinstance(node, Apply) and node.op == "mul" and node.dtype is DType.f32):
        return None
    code, scale = node.args
    if not (isinstance(code, Apply) and code.op == "cast" and code.args[0].dtype.is_int):
        return None
    return Weight(code.args[0], scale, minimum)


def _unrounded(node: Node) -> Node:
    """A node without the roundings that its kernel leaves out."""
    while isinstance(node, Apply) and node.op == "cast" and node.args[0].dtype is DType.f32:
        node = node.args[0]
    return node


def stored_codes(form: MatmulForm) -> Codes | None:
    """How the weights of a product are stored, when they are codes with a scale per group of columns."""
    k, extent = form.k.symbol, form.k.extent
    groups = set().union(*(_groups_of(d.b, k) for d in form.dots))
    if not groups or not extent.is_Integer:
        return None
    group = max(groups)
    if group & (group - 1) or group % 8 or int(extent) % group:
        return None
    return Codes(group, _halves(form))


UNIT = 16
"""Bytes of codes that a thread loads at once."""


INTEGER_ROWS = 8
"""Rows that are multiplied as integers, one by one: sums of more fill the registers, and take longer than their weights
take to arrive."""


def unit_of(form: MatmulForm) -> Codes | None:
    """Codes of a product in runs of 16 bytes, of which a row and what shares factors are whole ones, so that one thread
    may sum each up by itself; None for weights that have no such runs."""
    k, extent, columns = form.k.symbol, form.k.extent, UNIT * _halves(form)
    weights = [w for w in map(weight_of, (d.b for d in form.dots)) if w is not None]
    factors = [f for w in weights for f in (w.scale, w.minimum) if f is not None]
    if not extent.is_Integer or not all(_is_per_group(f, k) for f in factors):
        return None
    runs = {int(extent)}.union(*(_groups_of(f, k) for f in factors))
    return None if any(run % columns for run in runs) else Codes(columns, _halves(form))


def integer_unit(form: MatmulForm) -> Codes | None:
    """The units of a product of integers: of one row that may be rounded to int8, or of rows that are stored as such;
    None for other products."""
    unit, rows = unit_of(form), weight_of(form.a)
    count = prod((a.extent for a in form.rows), start=Integer(1))
    if unit is None or not (count.is_Integer and count <= INTEGER_ROWS):
        return None
    for dot in form.dots:
        weight, group = weight_of(dot.b), dot.activation_group
        found = None if weight is None else bytes_of(weight.code)
        if found is None or (found[1] is None) != (unit.halves == 1):
            return None
        if rows is None and (form.rows or not group or group % unit.group):
            return None
    if rows is None:
        return unit
    k = form.k.symbol
    plain = rows.minimum is None and isinstance(rows.code, Load) and rows.code.dtype is DType.i8
    shared = _is_per_group(rows.scale, k) and not any(g % unit.group for g in _groups_of(rows.scale, k))
    return unit if plain and shared else None


BYTE_ROWS = 32
"""Rows that are multiplied as bytes on tensor cores: as many as were measured to pay."""


def row_group(form: MatmulForm) -> int:
    """Columns that share a scale of the rows, where tensor cores may multiply these, stored as int8, with weights that
    are, too, and have a scale for each of their own rows; 0 for other products. Of a single row, what it may be rounded
    to."""
    k, extent, weights = form.k.symbol, form.k.extent, [weight_of(d.b) for d in form.dots]
    count = prod((a.extent for a in form.rows), start=Integer(1))
    few = count.is_Integer and count <= BYTE_ROWS and extent.is_Integer
    if not few or not all(w is not None and _is_byte(w) and w.is_scaled_once(k) for w in weights):
        return 0
    groups = _row_groups(form)
    # Tensor cores take 32 at least; sums of more than 256 may be too large for a float that counts ones.
    return next(
        (g for g in groups if len(groups) == 1 and g in (32, 64, 128, 256) and int(extent) % g == 0), 0
    )


def _row_groups(form: MatmulForm) -> set[int]:
    """Numbers of columns that share a scale of rows of bytes, stored or, of a single row, to be."""
    rows, k = weight_of(form.a), form.k.symbol
    if rows is None:
        return set() if form.rows else {d.activation_group for d in form.dots}
    varies = {a.symbol for a in form.rows} & free_symbols(rows.code)
    return _groups_of(rows.scale, k) if varies and _is_byte(rows) and _is_per_group(rows.scale, k) else set()


def _is_byte(weight: Weight) -> bool:
    return weight.minimum is None and isinstance(weight.code, Load) and weight.code.dtype is DType.i8


def _halves(form: MatmulForm) -> int:
    """Columns to a byte."""
    k = form.k.symbol
    indices = [e for d in form.dots for e in _indices(d.b, k)]
    packed = any({FloorDiv(k, Integer(8)), Mod(k, Integer(4))} <= e.atoms(FloorDiv, Mod) for e in indices)
    return 2 if packed else 1


def _indices(node: Node, k: Symbol) -> list[Expr]:
    """The index expressions below a node that mention k."""
    loads = [n for n in below(node) if isinstance(n, Load) and not n.indirect]
    return [e for load in loads for e in load.index if k in e.free_symbols]


def _groups_of(node: Node, k: Symbol) -> set[int]:
    """Numbers of columns that share something below a node."""
    return {
        int(d.args[1])
        for e in _indices(node, k)
        if not e.atoms(Mod)
        for d in e.atoms(FloorDiv)
        if d.args[0] == k and d.args[1].is_Integer
    }


def _is_per_group(node: Node, k: Symbol) -> bool:
    """Whether columns matter to a node by their groups alone."""
    whole = {FloorDiv(k, Integer(g)): Integer(0) for g in _groups_of(node, k)}
    inside = below(node)
    if any(
        (isinstance(n, Index) and k in n.expr.free_symbols) or (isinstance(n, Load) and n.indirect)
        for n in inside
    ):
        return False
    return not any(k in e.xreplace(whole).free_symbols for e in _indices(node, k))


@dataclass(frozen=True)
class GroupLoop:
    """A loop over groups, opened: its body, the blocks of a group and a place, and the names of their sizes.

    size: groups per iteration.
    """

    scope: Scope
    blocks: dict[Symbol, Block]
    size: int
    block_g: str
    places: str

    @staticmethod
    def begin(
        base: Scope, codes: Codes, extent: Expr, columns: int, stages: int = 0, whole: bool = False
    ) -> GroupLoop:
        """Open a loop over ``extent`` columns, about ``columns`` of them per iteration; ``stages`` as in
        ``loop_range``. whole: one iteration has all of them, so that no loop is needed."""
        size = max(1, columns // codes.group)
        groups = FloorDiv(extent, Integer(codes.group))
        block_g, places = base.constant("BLOCK_G", size), base.constant("PLACES", codes.places)
        place = base.bind(f"tl.arange(0, {places})[None, None, :]", "place")
        if whole:
            scope, start = base, ""
        else:
            scope, start = base.open(f"for start in {loop_range(groups, block_g, stages)}:"), "start + "
        g = scope.bind(f"({start}tl.arange(0, {block_g}))[None, :, None]", "g")
        even = groups.is_Integer and int(groups) % size == 0
        mask = "" if even else scope.bind(f"{g} < {print_index(groups)}", "g_ok")
        blocks = {GROUP: Block(g, mask, scope, groups), PLACE: Block(place, "", base, Integer(codes.places))}
        return GroupLoop(scope, blocks, size, block_g, places)

    def end(self, base: Scope) -> None:
        """Close the loop."""
        if self.scope is not base:
            base.close(self.scope)

    def shape(self, first: str) -> str:
        """The shape of a block of ``first`` columns of the result."""
        return f"[{first}, {self.block_g}, {self.places}]"


_HELPERS: dict[Expr, str] = {Integer(0): "low_codes", Integer(4): "high_codes"}
"""What unpacks four bits of a byte, by the first of them."""


def unpacked(column: Context, code: Node) -> tuple[str, int]:
    """Codes as float32, and what they are too large by."""
    if (found := bytes_of(code)) is not None:
        stored, shift = found
        helper = "bytes_to_float" if shift is None else _HELPERS.get(column.over_blocks(shift))
        if helper is not None:
            value = column.load(stored, convert=False)
            text = value.scope.bind(f"{helper}({value.text})", "code")
            return text, 0 if shift is None else CODE_BIAS
    value = column.named(code)
    return value.scope.bind(f"{value.text}.to(tl.float32)", "code"), 0


def bytes_of(code: Node) -> tuple[Load, Expr | None] | None:
    """The bytes that hold codes, and the bit at which a code of four bits begins there (None where a code is a byte);
    None for codes that are computed otherwise."""
    match code:
        case Load(dtype=DType.i8):
            return code, None
        case Apply(
            op="and",
            args=(Apply(op="shr", args=(Load(dtype=DType.u8) as load, Index(expr=shift))), Const(value=15)),
        ):
            return load, shift
    return None


def whole_weight(column: Context, weight: Weight, rounded: DType) -> str:
    """A weight in float32, as exact as one that is ``rounded`` next need be."""
    code, bias = unpacked(column, weight.code)
    scale = column.named(weight.scale)
    scope, added = deepest((scale.scope, column.blocks[GROUP].scope)), ""
    if weight.minimum is not None:
        added = column.named(weight.minimum).text
    if bias and added and rounded is not DType.f32:
        added = scope.bind(f"{added} - {scale.text} * {float(bias)}", "minimum")
    elif bias:
        code = f"({code} - {float(bias)})"
    return scope.bind(f"{code} * {scale.text}" + (f" + {added}" if added else ""), "weight")
