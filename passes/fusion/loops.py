"""Grouping the ops that no anchor took into loops over memory."""

from __future__ import annotations

import math

from tilewright.ir.errors import VerifyError
from tilewright.ir.loops import Reduce, Segment, free_symbols, post_order, scalarize
from tilewright.ir.types import concrete

from .groups import COSTLY, SOURCES, Groups, is_loop

_ELEMENTS_OF_A_KERNEL = 2**18  # that a reduction takes in about as long as one more kernel needs to start


def group_loops(groups: Groups) -> None:
    """Bottom-up: an op joins the one loop that uses it, or starts another."""
    for n in range(len(groups.ops) - 1, -1, -1):
        op = groups.ops[n]
        if n in groups.owner or not is_loop(op) or op.opcode in SOURCES:
            continue
        target = _consumer_group(groups, n)
        if (
            target is not None
            and _cheap_inside(groups, n, target)
            and groups.is_legal(groups.groups[target] | {n})
        ):
            groups.adopt(target, groups.groups[target] | {n})
        else:
            groups.start({n})
    _merge_siblings(groups)


def _consumer_group(groups: Groups, n: int) -> int | None:
    """The one loop kernel in which every use of op n lies, or None."""
    owners = {groups.owner.get(u) for u in groups.users[n]}
    if n in groups.returned or len(owners) != 1:
        return None
    (target,) = owners
    return target if target is not None and target not in groups.anchored else None


def _cheap_inside(groups: Groups, n: int, target: int) -> bool:
    """False when op n would be recomputed many times inside the target kernel."""
    op = groups.ops[n]
    if any(groups.ops[m].opcode == "quantize" and _sums_each(groups, m) for m in groups.groups[target]):
        return False
    if op.opcode == "reduce":
        members = groups.groups[target] | {n}
        if _reduces_for_each(groups, members):
            return False
        few = groups.points([n]) < groups.points(groups.groups[target])
        short = groups.points([n]) * _length(groups, n) <= _ELEMENTS_OF_A_KERNEL
        return (short and not few) or not _repeats(groups, members)
    if op.opcode not in COSTLY or groups.points([n]) >= groups.points(groups.groups[target]):
        return True
    return all(v.type.rank == 0 or v.shape[-1] == 1 for v in op.results)


def _reduces_for_each(groups: Groups, members: set[int]) -> bool:
    """True when a kernel would compute a reduction that has fewer results than the kernel in its innermost loop, not
    around it: that loop does not run along what was reduced, as where rows are stored with their axes moved. It may
    be as long as what each element reduces for itself alone, here or in what may still join, or take less time in all
    than one more kernel."""
    points = groups.points(groups.escaping(members) or members)
    around = [n for n in members | _above(groups, members) if groups.ops[n].opcode == "reduce"]
    own = max((_length(groups, n) for n in around if groups.points([n]) >= points), default=0)
    most = max(own, _ELEMENTS_OF_A_KERNEL // points)
    few = [n for n in around if n in members and groups.points([n]) < points and _length(groups, n) > most]
    extents = [{groups.ops[n].operands[0].shape[a] for a in groups.ops[n].attr("axes")} for n in few]
    return bool(few) and any(
        isinstance(node, Reduce)
        and {a.extent for a in node.axes} in extents
        and segment.axes[-1].symbol in free_symbols(node)
        for segment in _segments(groups, members)
        if segment.axes
        for node in segment.nodes()
    )


def _above(groups: Groups, members: set[int]) -> set[int]:
    """Ops in no kernel yet that the members are made of."""
    found: set[int] = set()
    todo = [p for n in members for p in groups.producers(n)]
    while todo:
        n = todo.pop()
        if n not in members | found and n not in groups.owner and is_loop(groups.ops[n]):
            found.add(n)
            todo += groups.producers(n)
    return found


def _length(groups: Groups, n: int) -> int:
    """Elements that each result of reduction n is made of, at the largest dims."""
    (x,) = groups.ops[n].operands
    return math.prod(concrete((x.shape[axis] for axis in groups.ops[n].attr("axes")), groups.highs))


def _sums_each(groups: Groups, n: int) -> bool:
    """True when each element that op n rounds is a reduction of its own, or made of one, unless that is stored already.
    Rounding needs an element several times: for the largest of its group, and for its code."""
    points, todo, seen = groups.points([n]), groups.producers(n), set[int]()
    while todo:
        m = todo.pop()
        if m in seen or groups.owner.get(m) in groups.anchored or not is_loop(groups.ops[m]):
            continue
        if groups.ops[m].opcode == "reduce" and groups.points([m]) >= points:
            return True
        seen.add(m)
        todo += groups.producers(m)
    return False


def _repeats(groups: Groups, members: set[int]) -> bool:
    """True when a kernel would reduce anew at every step of another reduction, for each of that one's results."""
    return any(
        isinstance(inner, Reduce) and free_symbols(inner) & {a.symbol for a in outer.axes}
        for segment in _segments(groups, members)
        for outer in segment.nodes()
        if isinstance(outer, Reduce)
        for inner in post_order(outer.body, set())
    )


def _segments(groups: Groups, members: set[int]) -> tuple[Segment, ...]:
    """The loops of a group's kernel; none where it can be no kernel."""
    try:
        return scalarize(groups.kernel(members)).segments
    except VerifyError:
        return ()


def _merge_siblings(groups: Groups) -> None:
    """Join a producer with consumers of the same shape that have no other relation: one pass over memory."""
    for n in range(len(groups.ops) - 1, -1, -1):
        home = groups.owner.get(n)
        if home is None or home in groups.anchored or not groups.groups[home] or n in groups.returned:
            continue
        owners = {groups.owner.get(u) for u in groups.users[n]} - {home}
        if None in owners or not owners or any(o in groups.anchored for o in owners):
            continue
        joined = set(groups.groups[home]).union(*(groups.groups[o] for o in owners if o is not None))
        shapes = {v.shape for m in groups.escaping(joined) for v in groups.ops[m].results}
        outside = [p for m in joined for p in groups.producers(m)]
        if len(shapes) == 1 and not groups.depends(outside, joined) and groups.is_legal(joined):
            if _repeats(groups, joined) or _reduces_for_each(groups, joined):
                continue
            for o in owners:
                assert o is not None
                groups.groups[o] = set()
            groups.adopt(home, joined)
