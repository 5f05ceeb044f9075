"""Growing a kernel downwards from its anchor."""

from __future__ import annotations

from tilewright.ir.loops import PRIMITIVES

from .groups import Groups, is_loop

_OF_OTHERS = ("reduce", "gather", "quantize")
"""Ops of which an element needs others than its own of what is above."""


def grow_epilogue(groups: Groups, group: int) -> None:
    """Add the ops below the anchor that may run on its tile and make fewer bytes escape.

    All of them if that is legal, else one by one.
    """
    grown = _closure(groups, group)
    trimmed = _trim(groups, grown, groups.groups[group])
    if trimmed != groups.groups[group] and groups.is_legal(trimmed):
        groups.adopt(group, trimmed)
        return
    current = set(groups.groups[group])
    for n in sorted(trimmed - current):
        if _producers_ready(groups, n, current) and groups.is_legal(_trim(groups, current | {n}, current)):
            current |= {n}
    current = _trim(groups, current, groups.groups[group])
    if groups.is_legal(current):
        groups.adopt(group, current)


def _producers_ready(groups: Groups, n: int, members: set[int]) -> bool:
    return not groups.depends(groups.producers(n), members)


def _closure(groups: Groups, group: int) -> set[int]:
    """Every op below the anchor that could run in its epilogue."""
    members = set(groups.groups[group])
    primitive = any(groups.ops[n].opcode in PRIMITIVES for n in members)
    for n in range(min(members) + 1, len(groups.ops)):
        op = groups.ops[n]
        if n in groups.owner or not any(p in members for p in groups.producers(n)):
            continue
        fits = op.opcode == "view" if primitive else is_loop(op) and op.opcode not in _OF_OTHERS
        if fits and _producers_ready(groups, n, members):
            members.add(n)
    return members


def _trim(groups: Groups, members: set[int], core: set[int]) -> set[int]:
    """Drop ops at the lower edge as long as that makes fewer bytes escape."""
    members = set(members)
    while (dropped := _droppable(groups, members, core)) is not None:
        members -= dropped
    return members


def _droppable(groups: Groups, members: set[int], core: set[int]) -> set[int] | None:
    """Ops at the lower edge, one or a chain of them, without which fewer bytes escape."""
    cost = _escaping_bytes(groups, members)
    for n in sorted(members - core, reverse=True):
        chain: set[int] = set()
        edge = [n]
        while edge:
            chain |= {m for m in edge if _at_edge(groups, m, members - chain)}
            if not set(edge) <= chain:
                break
            # What the function returns is stored in any case, by this kernel or by one more.
            stored = sum(groups.nbytes(m) for m in chain & groups.returned)
            if _escaping_bytes(groups, members - chain) + stored < cost:
                return chain
            edge = [p for m in edge for p in groups.producers(m) if p in members - core]
    return None


def _at_edge(groups: Groups, n: int, members: set[int]) -> bool:
    """True when no member uses op n, so that it may be left out."""
    return groups.ops[n].opcode != "append" and not any(u in members for u in groups.users[n])


def _escaping_bytes(groups: Groups, members: set[int]) -> int:
    return sum(groups.nbytes(n) for n in groups.escaping(members))
