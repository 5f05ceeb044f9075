"""Growing a matrix product's kernel upwards: what it may compute again instead of reading it from memory."""

from __future__ import annotations

import sympy

from tilewright.ir.loops import PRIMITIVES
from tilewright.ir.types import concrete
from tilewright.passes.last_tokens import LAST

from .groups import COSTLY, SOURCES, Groups, is_loop


def grow_prologue(groups: Groups, group: int, plain_factors: bool) -> None:
    """Add the ops above a product that are used in it alone, and keep those that save bytes between kernels.

    plain_factors: no codes as weights (but of the last positions' products, whose rows are few) and of the rows only
    views, since every tile of rows would unpack its weights again, and every tile of columns compute its rows."""
    core = groups.groups[group]
    if any(groups.ops[n].opcode in PRIMITIVES for n in core):
        return
    members = set(core)
    for n in range(max(members), -1, -1):
        if n in groups.owner or not _recomputable(groups, n, members):
            continue
        if plain_factors and _makes_factor(groups, n, members):
            continue
        if groups.is_legal(members | {n}):
            members.add(n)
    for n in sorted(members - core, reverse=True):
        without = _without(groups, n, members, core)
        if _frontier_bytes(groups, without) < _frontier_bytes(groups, members) and groups.is_legal(without):
            members = without
    groups.adopt(group, members)


def _makes_factor(groups: Groups, n: int, members: set[int]) -> bool:
    """True when op n unpacks codes for many rows, or when it is no view and the product's rows are made of its result,
    through views at most."""
    rows = next(groups.ops[m].operands[0] for m in members if groups.ops[m].opcode == "matmul")
    if groups.ops[n].opcode == "dequantize":
        return not any(LAST in extent.free_symbols for extent in rows.shape)
    if groups.ops[n].opcode == "view":
        return False
    while (at := groups.at.get(rows)) is not None and at != n:
        if groups.ops[at].opcode != "view":
            return False
        (rows,) = groups.ops[at].operands
    return at == n


def _without(groups: Groups, n: int, members: set[int], core: set[int]) -> set[int]:
    """Members less op n and the prologue ops that served it alone."""
    left = members - {n}
    for p in sorted(members - core, reverse=True):
        if p in left and not any(u in left for u in groups.users[p]):
            left.discard(p)
    return left


def _frontier_bytes(groups: Groups, members: set[int]) -> int:
    """Bytes that other kernels have to store only because this one reads them."""
    read = {p for n in members for p in groups.producers(n)} - members - groups.owner.keys()
    return sum(
        groups.nbytes(p) for p in read if is_loop(groups.ops[p]) and groups.ops[p].opcode not in SOURCES
    )


def _recomputable(groups: Groups, n: int, members: set[int]) -> bool:
    """True when op n is used in this kernel only and may be computed again in each of its tiles."""
    op = groups.ops[n]
    if not is_loop(op) or op.opcode in ("append", *SOURCES):
        return False
    if n in groups.returned or any(u not in members for u in groups.users[n]):
        return False
    return op.opcode not in (*COSTLY, "reduce") or groups.points([n]) <= _rows(groups, members)


def _rows(groups: Groups, members: set[int]) -> int:
    """Rows of the kernel's matrix product."""
    product = next(groups.ops[n] for n in members if groups.ops[n].opcode == "matmul")
    return concrete((sympy.prod(product.operands[0].shape[:-1], start=sympy.Integer(1)),), groups.highs)[0]
