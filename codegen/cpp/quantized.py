"""Products whose weights are stored as codes: recognising them, and printing where their blocks lie (``quantized.h``).

In loop form such a weight is ``scale[n] * codes[n // 16, k // 4, n % 16, k % 4]``, or for 4 bits a half of a byte,
times ``scale``, plus ``minimum``. A run of sixteen columns then reads one block of interleaved rows, provided that
it is aligned: what the epilogue does with the columns (RoPE's halves, a gate beside its up-projection) must keep runs
whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy import Expr, Integer

from tilewright.ir.index import FloorDiv, Mod, simplify, sym
from tilewright.ir.loops import Apply, Dot, Load, MatmulForm, Node
from tilewright.ir.types import DType

ROW_BLOCK, GROUP = 16, 32  # quantized.h: ROW_BLOCK, ACTIVATION_GROUP
MAX_ROWS = 16
"""With more rows of activations, expanding the weights once per panel costs less than it saves."""


@dataclass(frozen=True)
class StoredWeight:
    """The loads behind one dot product's weight. ``block``: the number of its block, over the column axes.
    ``grouped``: whether each group of columns has a scale, or each row."""

    codes: Load
    scale: Load
    minimum: Load | None
    block: Expr
    grouped: bool

    @property
    def kind(self) -> str:
        """The C++ class that knows the format."""
        return f"tw::Int8<{str(self.grouped).lower()}>" if self.minimum is None else "tw::Int4"


def stored_weights(form: MatmulForm) -> tuple[StoredWeight, ...] | None:
    """The stored weight of each dot of a product, all of one kind; None when some other code has to read them."""
    found = [_stored_weight(form, dot) for dot in form.dots]
    weights = tuple(w for w in found if w is not None)
    return weights if len(weights) == len(found) and len({w.kind for w in weights}) == 1 else None


def _stored_weight(form: MatmulForm, dot: Dot) -> StoredWeight | None:
    parts = _parts(dot.b)
    k = form.k
    if parts is None or not form.columns or not k.extent.is_Integer or k.extent % GROUP != 0:
        return None
    codes, scale, minimum = parts
    four = minimum is not None
    grouped = scale.value.type.rank == 3 and scale.value.shape[1] == k.extent / GROUP
    row_index = _row_index(codes, k.symbol, 8 if four else 4)
    if row_index is None or any(
        _scale_index(part, k.symbol, four or grouped) != row_index
        for part in (scale, minimum)
        if part is not None
    ):
        return None
    block = _aligned_block(form, row_index)
    return None if block is None else StoredWeight(codes, scale, minimum, block, grouped)


def _parts(node: Node) -> tuple[Load, Load, Load | None] | None:
    """Codes, scale and minimum of a weight in the form that ``dequantize`` has."""
    node = _without_casts(node)
    minimum: Node | None = None
    if isinstance(node, Apply) and node.op == "add":
        minimum = _without_casts(node.args[1])
        node = node.args[0]
    if not isinstance(node, Apply) or node.op != "mul":
        return None
    code, scale = (_without_casts(a) for a in node.args)
    if minimum is not None:
        shifted = code.args[0] if isinstance(code, Apply) and code.op == "and" else None
        if not isinstance(shifted, Apply) or shifted.op != "shr":
            return None
        code = shifted.args[0]
    wanted = (DType.i8, DType.f32) if minimum is None else (DType.u8, DType.f16)
    if not isinstance(code, Load) or not isinstance(scale, Load) or (code.dtype, scale.dtype) != wanted:
        return None
    if code.indirect or scale.indirect or not isinstance(minimum, Load | None):
        return None
    return code, scale, minimum


def _without_casts(node: Node) -> Node:
    while isinstance(node, Apply) and node.op == "cast":
        node = node.args[0]
    return node


def _row_index(codes: Load, k: sympy.Symbol, run: int) -> tuple[Expr, Expr] | None:
    """Block and lane of the row that is read, when the layout is the interleaved one."""
    if codes.value.type.rank != 4 or codes.value.shape[2:] != (ROW_BLOCK, 4):
        return None
    block, column, lane, place = codes.index
    if column != FloorDiv(k, Integer(run)) or place != Mod(k, Integer(4)):
        return None
    return None if k in block.free_symbols | lane.free_symbols else (block, lane)


def _scale_index(scale: Load, k: sympy.Symbol, grouped: bool) -> tuple[Expr, Expr] | None:
    if scale.value.type.rank != 3 or scale.value.shape[2] != ROW_BLOCK:
        return None
    block, column, lane = scale.index
    # A single group needs no index.
    single = scale.value.shape[1] == 1
    expected = FloorDiv(k, Integer(GROUP)) if grouped and not single else Integer(0)
    return (block, lane) if column == expected else None


def _aligned_block(form: MatmulForm, row_index: tuple[Expr, Expr]) -> Expr | None:
    """The block that sixteen columns in a row read, when they read its sixteen rows in order."""
    inner = form.columns[-1]
    if not inner.extent.is_Integer or inner.extent % ROW_BLOCK != 0:
        return None
    run, lane = sym("run"), sym("lane")
    ranges = {a.symbol: a.extent for a in form.columns[:-1]}
    ranges |= {run: inner.extent / ROW_BLOCK, lane: Integer(ROW_BLOCK)}
    block, row = (simplify(e.xreplace({inner.symbol: ROW_BLOCK * run + lane}), ranges) for e in row_index)
    return row_index[0] if row == lane and lane not in block.free_symbols else None
