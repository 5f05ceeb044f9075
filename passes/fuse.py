"""Fuses ops into kernels by one rule: a kernel is legal when its loop form is, and good when it stores fewer bytes.

    %h = mul %x, %w                              %k = kernel %x, %w, %m, %r [
    %y = matmul %h, %m                =>           %h = mul %x, %w
    %o = add %y, %r                                %y = matmul %h, %m
                                                   %o = add %y, %r ] {name = "main_0_matmul"}

Four steps, none of which knows a model:
1. *Epilogues*: from each anchor (matmul, attention) downwards, as long as every segment stays a matrix product (or the
   attention's results pass through views only) and the bytes that escape do not grow.
2. *Prologues*: upwards from each matmul, ops whose every use lies in such kernels; they are recomputed there, so only
   cheap ones, or those with one value per row.
3. *Loops*: what is left, bottom-up: an op joins the kernel of its consumers when they are one kernel.

Before that, views, casts and constants, which cost nothing inside a kernel, are copied so that each has one user.

``scalarize`` decides legality; see ``ir.loops``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import sympy

from tilewright.ir.errors import VerifyError
from tilewright.ir.index import IndexMap, index_symbols
from tilewright.ir.loops import attention_form, matmul_form, scalarize
from tilewright.ir.module import Function, Module, Names, Op, make_attrs
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.types import Value, concrete

from .base import PassOptions
from .dce import has_effect

_ATTENTION = ("attention", "attention_split")
_ANCHORS = ("matmul", *_ATTENTION)
_SOURCES = ("const", "iota", "dim")
_FREE = (*_SOURCES, "view", "cast")
_COSTLY = ("exp", "log", "sin", "cos", "tanh", "erf", "sigmoid", "pow")


def fuse(module: Module, options: PassOptions) -> Module:
    """Replace every computing op by kernels; params, calls and PyTorch calls stay."""
    highs = {name: high for name, _, high in module.symbols}
    return module.with_functions(
        f if f.name.endswith(".weights") else _Fuser(_copy_free_ops(_copy_returns(f)), highs).run()
        for f in module.functions
    )


def _copy_returns(function: Function) -> Function:
    """Return each value from memory of its own: parameters, weights and values returned twice are copied."""
    names = Names.of(function)
    made = function.definitions()
    copies: list[Op] = []
    returns: list[Value] = []
    for value in function.returns:
        if value in returns or value not in made or made[value].opcode in ("param", "append"):
            index_map = IndexMap(value.type.rank, index_symbols(value.type.rank))
            copy = Value(names.fresh(), value.type)
            copies.append(Op("view", (value,), make_attrs({"map": index_map}), (copy,)))
            value = copy
        returns.append(value)
    return function.with_ops((*function.ops, *copies), returns)


def _copy_free_ops(function: Function) -> Function:
    """Give every use of a view, cast or constant its own copy."""
    names = Names.of(function)
    made = function.definitions()
    used: set[Value] = set(function.returns)
    out: list[Op] = []

    def copy(value: Value) -> Value:
        """``value`` for one more use: itself the first time, else a copy whose op goes in front of the user."""
        op = made.get(value)
        if op is None or op.opcode not in _FREE or value not in used:
            used.add(value)
            return value
        new = Value(names.fresh(), value.type)
        before.append(replace(op, operands=tuple(copy(v) for v in op.operands), results=(new,)))
        return new

    for op in function.ops:
        before: list[Op] = []
        table = {v: copy(v) for v in dict.fromkeys(op.operands)}
        out += [*before, op.with_operands(table)]
    return function.with_ops(out)


def _is_loop(op: Op) -> bool:
    return op.opcode in POINTWISE or op.opcode in ("view", "concat", "gather", "reduce", "append", *_SOURCES)


class _Fuser:
    """Groups the ops of one function. A group is a set of positions in ``ops``; ``owner`` maps position -> group."""

    def __init__(self, function: Function, highs: dict[str, int]) -> None:
        self.function = function
        self.ops = function.ops
        self.highs = highs
        self.at = {v: n for n, op in enumerate(self.ops) for v in op.results}
        self.users: dict[int, list[int]] = {n: [] for n in range(len(self.ops))}
        for n, op in enumerate(self.ops):
            for v in dict.fromkeys(op.operands):
                if v in self.at:
                    self.users[self.at[v]].append(n)
        self.returned = {self.at[v] for v in function.returns if v in self.at}
        self.groups: list[set[int]] = []
        self.owner: dict[int, int] = {}
        self.anchored: set[int] = set()

    def run(self) -> Function:
        for n, op in enumerate(self.ops):
            if op.opcode == "matmul" or op.opcode in _ATTENTION:
                self._start({n}, anchored=True)
        for group in sorted(self.anchored):
            self._grow_epilogue(group)
        for group in sorted(self.anchored):
            self._grow_prologue(group)
        self._group_loops()
        return self._emit()

    # -- helpers -----------------------------------------------------------------------------------------------

    def _start(self, members: set[int], anchored: bool = False) -> int:
        self.groups.append(members)
        number = len(self.groups) - 1
        self.owner.update(dict.fromkeys(members, number))
        if anchored:
            self.anchored.add(number)
        return number

    def _producers(self, n: int) -> list[int]:
        return [self.at[v] for v in dict.fromkeys(self.ops[n].operands) if v in self.at]

    def _bytes(self, n: int) -> int:
        """Bytes that op n's results take in memory at the largest dims; an append's go to the state in any case."""
        if self.ops[n].opcode == "append":
            return 0
        return sum(concrete((v.type.nbytes,), self.highs)[0] for v in self.ops[n].results)

    def _escaping(self, members: set[int]) -> list[int]:
        """Members whose results are needed outside."""
        return [n for n in sorted(members) if any(self._needed(v, members) for v in self.ops[n].results)]

    def _needed(self, value: Value, members: set[int]) -> bool:
        n = self.at[value]
        if value in self.function.returns or has_effect(self.ops[n]):
            return True
        return any(value in self.ops[u].operands for u in self.users[n] if u not in members)

    def _kernel(self, members: set[int]) -> Op:
        """The kernel op for a group and the sources that it reads; named when emitted."""
        body = tuple(self.ops[n] for n in sorted(self._with_sources(members)))
        made = {v for op in body for v in op.results}
        reads = tuple(dict.fromkeys(v for op in body for v in op.operands if v not in made))
        results = tuple(v for n in sorted(members) for v in self.ops[n].results if self._needed(v, members))
        anchor = next((op for op in body if op.opcode in _ANCHORS), body[-1])
        return Op("kernel", reads, make_attrs({"name": ""}), results, anchor.loc, body)

    def _with_sources(self, members: set[int]) -> set[int]:
        """Members plus the constants, iotas and dims that they read."""
        read = {p for n in members for p in self._producers(n)}
        return members | {p for p in read if self.ops[p].opcode in _SOURCES}

    def _legal(self, members: set[int]) -> bool:
        kernel = self._kernel(members)
        if not kernel.results:
            return True
        try:
            if any(self.ops[n].opcode in _ATTENTION for n in members):
                return attention_form(kernel) is not None
            loops = scalarize(kernel)
        except VerifyError:
            return False
        if any(self.ops[n].opcode == "matmul" for n in members):
            return all(matmul_form(s) is not None for s in loops.segments) or len(members) == 1
        return True

    def _depends(self, start: Iterable[int], members: set[int]) -> bool:
        """True when an op of ``start`` outside the group depends on the group."""
        seen: set[int] = set()
        todo = [n for n in start if n not in members]
        while todo:
            n = todo.pop()
            if n in seen:
                continue
            seen.add(n)
            for p in self._producers(n):
                if p in members:
                    return True
                todo.append(p)
                if p in self.owner:
                    todo += self.groups[self.owner[p]] - seen
        return False

    # -- 1. epilogues ------------------------------------------------------------------------------------------

    def _grow_epilogue(self, group: int) -> None:
        grown = self._closure(group)
        trimmed = self._trim(grown, self.groups[group])
        if trimmed != self.groups[group] and self._legal(trimmed):
            self._adopt(group, trimmed)
            return
        current = set(self.groups[group])
        for n in sorted(trimmed - current):
            if self._producers_ready(n, current) and self._legal(self._trim(current | {n}, current)):
                current |= {n}
        current = self._trim(current, self.groups[group])
        if self._legal(current):
            self._adopt(group, current)

    def _adopt(self, group: int, members: set[int]) -> None:
        self.groups[group] = members
        self.owner.update(dict.fromkeys(members, group))

    def _producers_ready(self, n: int, members: set[int]) -> bool:
        return not self._depends(self._producers(n), members)

    def _closure(self, group: int) -> set[int]:
        """Every op below the anchor that could run in its epilogue."""
        members = set(self.groups[group])
        attention = any(self.ops[n].opcode in _ATTENTION for n in members)
        for n in range(min(members) + 1, len(self.ops)):
            op = self.ops[n]
            if n in self.owner or not any(p in members for p in self._producers(n)):
                continue
            fits = (
                op.opcode == "view" if attention else _is_loop(op) and op.opcode not in ("reduce", "gather")
            )
            if fits and self._producers_ready(n, members):
                members.add(n)
        return members

    def _trim(self, members: set[int], core: set[int]) -> set[int]:
        """Drop ops at the lower edge as long as that makes fewer bytes escape."""
        members = set(members)

        def cost(candidate: set[int]) -> int:
            return sum(self._bytes(n) for n in self._escaping(candidate))

        changed = True
        while changed:
            changed = False
            for n in sorted(members - core, reverse=True):
                if self.ops[n].opcode == "append" or any(u in members for u in self.users[n]):
                    continue
                if cost(members - {n}) < cost(members):
                    members.discard(n)
                    changed = True
        return members

    # -- 2. prologues ------------------------------------------------------------------------------------------

    def _grow_prologue(self, group: int) -> None:
        core = self.groups[group]
        if any(self.ops[n].opcode in _ATTENTION for n in core):
            return
        members = set(core)
        for n in range(max(members), -1, -1):
            if n not in self.owner and self._recomputable(n, members) and self._legal(members | {n}):
                members.add(n)
        for n in sorted(members - core, reverse=True):
            without = self._without(n, members, core)
            if self._frontier_bytes(without) < self._frontier_bytes(members) and self._legal(without):
                members = without
        self._adopt(group, members)

    def _without(self, n: int, members: set[int], core: set[int]) -> set[int]:
        """Members less op n and the prologue ops that served it alone."""
        left = members - {n}
        for p in sorted(members - core, reverse=True):
            if p in left and not any(u in left for u in self.users[p]):
                left.discard(p)
        return left

    def _frontier_bytes(self, members: set[int]) -> int:
        """Bytes that other kernels have to store only because this one reads them."""
        read = {p for n in members for p in self._producers(n)} - members - self.owner.keys()
        return sum(
            self._bytes(p) for p in read if _is_loop(self.ops[p]) and self.ops[p].opcode not in _SOURCES
        )

    def _recomputable(self, n: int, members: set[int]) -> bool:
        """True when op n is used in this kernel only and may be computed again in each of its tiles."""
        op = self.ops[n]
        if not _is_loop(op) or op.opcode in ("append", *_SOURCES):
            return False
        if n in self.returned or any(u not in members for u in self.users[n]):
            return False
        return op.opcode not in (*_COSTLY, "reduce") or self._points([n]) <= self._rows(members)

    def _rows(self, members: set[int]) -> int:
        """Rows of the kernel's matrix product."""
        product = next(self.ops[n] for n in members if self.ops[n].opcode == "matmul")
        return concrete((sympy.prod(product.operands[0].shape[:-1], start=sympy.Integer(1)),), self.highs)[0]

    # -- 3. loops ----------------------------------------------------------------------------------------------

    def _group_loops(self) -> None:
        for n in range(len(self.ops) - 1, -1, -1):
            op = self.ops[n]
            if n in self.owner or not _is_loop(op) or op.opcode in _SOURCES:
                continue
            target = self._consumer_group(n)
            if (
                target is not None
                and self._cheap_inside(n, target)
                and self._legal(self.groups[target] | {n})
            ):
                self._adopt(target, self.groups[target] | {n})
            else:
                self._start({n})
        self._merge_siblings()

    def _consumer_group(self, n: int) -> int | None:
        """The one loop kernel in which every use of op n lies, or None."""
        owners = {self.owner.get(u) for u in self.users[n]}
        if n in self.returned or len(owners) != 1:
            return None
        (target,) = owners
        return target if target is not None and target not in self.anchored else None

    def _points(self, members: Iterable[int]) -> int:
        return max(concrete((v.type.numel,), self.highs)[0] for n in members for v in self.ops[n].results)

    def _cheap_inside(self, n: int, target: int) -> bool:
        """False when op n would be recomputed many times inside the target kernel."""
        op = self.ops[n]
        if op.opcode not in (*_COSTLY, "reduce") or self._points([n]) >= self._points(self.groups[target]):
            return True
        if op.opcode == "reduce":  # over the innermost axes: computed once per row, outside the row's loop
            rank = op.operands[0].type.rank
            return bool(op.attr("axes") == tuple(range(rank - len(op.attr("axes")), rank)))
        return all(v.type.rank == 0 or v.shape[-1] == 1 for v in op.results)

    def _merge_siblings(self) -> None:
        """Join a producer with consumers of the same shape that have no other relation: one pass over memory."""
        for n in range(len(self.ops) - 1, -1, -1):
            home = self.owner.get(n)
            if home is None or home in self.anchored or not self.groups[home] or n in self.returned:
                continue
            owners = {self.owner.get(u) for u in self.users[n]} - {home}
            if None in owners or not owners or any(o in self.anchored for o in owners):
                continue
            joined = set(self.groups[home]).union(*(self.groups[o] for o in owners if o is not None))
            shapes = {v.shape for m in self._escaping(joined) for v in self.ops[m].results}
            outside = [p for m in joined for p in self._producers(m)]
            if len(shapes) == 1 and not self._depends(outside, joined) and self._legal(joined):
                for o in owners:
                    assert o is not None
                    self.groups[o] = set()
                self._adopt(home, joined)

    # -- 4. emission -------------------------------------------------------------------------------------------

    def _emit(self) -> Function:
        kernels = [k for k in (self._kernel(members) for members in self.groups if members) if k.results]
        rest = [op for n, op in enumerate(self.ops) if n not in self.owner and op.opcode not in _SOURCES]
        ordered = _schedule([*rest, *kernels, *self._loose_sources(rest)], self.function)
        name = _namer(self.function.name)
        return self.function.with_ops(
            op.with_attrs(name=name(op)) if op.opcode == "kernel" else op for op in ordered
        )

    def _loose_sources(self, rest: list[Op]) -> list[Op]:
        """Kernels for constants that are returned, or given to calls."""
        wanted = {v for op in rest for v in op.operands} | set(self.function.returns)
        return [
            Op("kernel", (), make_attrs({"name": ""}), op.results, op.loc, (op,))
            for op in self.ops
            if op.opcode in _SOURCES and op.result in wanted
        ]


def _namer(function: str) -> Callable[[Op], str]:
    """Kernel names: function, running number, what it does."""
    count = 0

    def name(op: Op) -> str:
        nonlocal count
        opcodes = [o.opcode for o in op.body]
        kind = next((k for k in ("matmul", *_ATTENTION, "gather", "reduce") if k in opcodes), "pointwise")
        count += 1
        return f"{function}_{count - 1}_{kind}"

    return name


def _schedule(ops: list[Op], function: Function) -> list[Op]:
    """Topological order; among the ready, the one whose first op came first in the source."""
    position = {v: n for n, op in enumerate(function.ops) for v in op.results}

    def key(op: Op) -> int:
        return max((position[v] for v in op.results), default=len(position))

    pending = sorted(ops, key=key)
    known = set(function.params)
    out: list[Op] = []
    while pending:
        ready = next((op for op in pending if all(v in known for v in op.operands)), None)
        if ready is None:
            raise VerifyError(f"@{function.name}: fusion made a cycle")
        pending.remove(ready)
        out.append(ready)
        known.update(ready.results)
    return out
