"""Growing a matrix product's kernel upwards: what it may compute again instead of reading it from memory."""

from __future__ import annotations

import sympy

from tilewright.ir.loops import PRIMITIVES
from tilewright.ir.types import Value, concrete
from tilewright.passes.base import PassOptions
from tilewright.passes.last_tokens import LAST

from .groups import COSTLY, SOURCES, Groups, is_loop


def grow_prologue(groups: Groups, group: int, options: PassOptions) -> None:
    """Add the ops above a product that are used in it alone, and keep those that save bytes between kernels.

    With ``plain_rows`` of the rows only views and floats of codes, since every tile of columns would compute again what
    they are made of; with ``plain_weights`` no codes, since every tile of rows would unpack them again. (Rows of the
    last positions are few.)"""
    core = groups.groups[group]
    if any(groups.ops[n].opcode in PRIMITIVES for n in core):
        return
    members = set(core)
    for n in range(max(members), -1, -1):
        if n in groups.owner or not _recomputable(groups, n, members):
            continue
        if options.plain_weights and _unpacks_for_many(groups, n, members):
            continue
        if options.plain_rows and groups.ops[n].opcode not in _AS_STORED and _makes_rows(groups, n, members):
            continue
        if groups.is_legal(members | {n}):
            members.add(n)
    for n in sorted(members - core, reverse=True):
        without = _without(groups, n, members, core)
        if _frontier_bytes(groups, without) < _frontier_bytes(groups, members) and groups.is_legal(without):
            members = without
    groups.adopt(group, members)


def _unpacks_for_many(groups: Groups, n: int, members: set[int]) -> bool:
    """True when op n makes weights of codes, for more rows than those of the last positions."""
    last = any(LAST in extent.free_symbols for extent in _left(groups, members).shape)
    return groups.ops[n].opcode == "dequantize" and not last


_AS_STORED = ("view", "dequantize")
"""Ops that read what is in memory as a product needs it."""


def _makes_rows(groups: Groups, n: int, members: set[int]) -> bool:
    """True when the product's rows are made of op n's result, through views and codes at most."""
    rows = {_left(groups, members)}
    while made := {at for v in rows if (at := groups.at.get(v)) is not None}:
        if n in made:
            return True
        made = {at for at in made if groups.ops[at].opcode in _AS_STORED}
        rows = {v for at in made for v in groups.ops[at].operands}
    return False


def _left(groups: Groups, members: set[int]) -> Value:
    """The left operand of the kernel's matrix product."""
    return next(groups.ops[m].operands[0] for m in members if groups.ops[m].opcode == "matmul")


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
    return op.opcode not in (*COSTLY, "reduce", "quantize") or groups.points([n]) <= _rows(groups, members)


def _rows(groups: Groups, members: set[int]) -> int:
    """Rows of the kernel's matrix product."""
    rows = _left(groups, members)
    return concrete((sympy.prod(rows.shape[:-1], start=sympy.Integer(1)),), groups.highs)[0]
