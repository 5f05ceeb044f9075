"""Grouping the ops that no anchor took into loops over memory."""

from __future__ import annotations

from tilewright.ir.errors import VerifyError
from tilewright.ir.loops import Reduce, free_symbols, post_order, scalarize

from .groups import COSTLY, SOURCES, Groups, is_loop


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
    if op.opcode not in (*COSTLY, "reduce") or groups.points([n]) >= groups.points(groups.groups[target]):
        return True
    if op.opcode == "reduce":  # over the innermost axes: computed once per row, outside the row's loop
        rank = op.operands[0].type.rank
        innermost = op.attr("axes") == tuple(range(rank - len(op.attr("axes")), rank))
        return bool(innermost and not _repeats(groups, groups.groups[target] | {n}))
    return all(v.type.rank == 0 or v.shape[-1] == 1 for v in op.results)


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
    try:
        segments = scalarize(groups.kernel(members)).segments
    except VerifyError:  # no kernel at all
        return False
    return any(
        isinstance(inner, Reduce) and free_symbols(inner) & {a.symbol for a in outer.axes}
        for segment in segments
        for outer in segment.nodes()
        if isinstance(outer, Reduce)
        for inner in post_order(outer.body, set())
    )


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
            if _repeats(groups, joined):
                continue
            for o in owners:
                assert o is not None
                groups.groups[o] = set()
            groups.adopt(home, joined)
