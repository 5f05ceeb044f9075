"""Groups of ops that are to become kernels, and what may be asked of them."""

from __future__ import annotations

from collections.abc import Iterable

from tilewright.ir.errors import VerifyError
from tilewright.ir.loops import PRIMITIVES, attention_form, product_form, scalarize, sole_op
from tilewright.ir.module import Function, Op, make_attrs
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.types import Value, concrete

from ..dce import has_effect

ATTENTION = ("attention", "attention_split")
ANCHORS = ("matmul", *PRIMITIVES)
SOURCES = ("const", "iota", "dim")
_LOOPS = ("view", "concat", "gather", "reduce", "append", "quantize", "dequantize", *SOURCES)
COSTLY = ("exp", "log", "sin", "cos", "tanh", "erf", "sigmoid", "pow")


def is_loop(op: Op) -> bool:
    """True for an op that a loop can compute element by element."""
    return op.opcode in POINTWISE or op.opcode in _LOOPS


class Groups:
    """The ops of one function, by position, and the disjoint groups formed so far.

    A group is a set of positions in ``ops``; ``owner`` maps a position to its group's number. ``anchored`` numbers the
    groups that hold one of ``ANCHORS``.
    """

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

    def start(self, members: set[int], anchored: bool = False) -> int:
        """A new group; gives its number."""
        self.groups.append(members)
        number = len(self.groups) - 1
        self.owner.update(dict.fromkeys(members, number))
        if anchored:
            self.anchored.add(number)
        return number

    def adopt(self, group: int, members: set[int]) -> None:
        """Make ``members`` the group's ops."""
        self.groups[group] = members
        self.owner.update(dict.fromkeys(members, group))

    def producers(self, n: int) -> list[int]:
        """Positions of the ops that op n reads."""
        return [self.at[v] for v in dict.fromkeys(self.ops[n].operands) if v in self.at]

    def nbytes(self, n: int) -> int:
        """Bytes that op n's results take in memory at the largest dims; an append's go to the state in any case."""
        if self.ops[n].opcode == "append":
            return 0
        return sum(concrete((v.type.nbytes,), self.highs)[0] for v in self.ops[n].results)

    def points(self, members: Iterable[int]) -> int:
        """The most elements that a result of these ops has, at the largest dims."""
        return max(concrete((v.type.numel,), self.highs)[0] for n in members for v in self.ops[n].results)

    def escaping(self, members: set[int]) -> list[int]:
        """Members whose results are needed outside."""
        return [n for n in sorted(members) if any(self.needed(v, members) for v in self.ops[n].results)]

    def needed(self, value: Value, members: set[int]) -> bool:
        """True when a member's result is used outside."""
        n = self.at[value]
        if value in self.function.returns or has_effect(self.ops[n]):
            return True
        return any(value in self.ops[u].operands for u in self.users[n] if u not in members)

    def kernel(self, members: set[int]) -> Op:
        """The kernel op for a group and the sources that it reads; named when emitted."""
        body = tuple(self.ops[n] for n in sorted(self.with_sources(members)))
        made = {v for op in body for v in op.results}
        reads = tuple(dict.fromkeys(v for op in body for v in op.operands if v not in made))
        results = tuple(v for n in sorted(members) for v in self.ops[n].results if self.needed(v, members))
        anchor = next((op for op in body if op.opcode in ANCHORS), body[-1])
        return Op("kernel", reads, make_attrs({"name": ""}), results, anchor.loc, body)

    def with_sources(self, members: set[int]) -> set[int]:
        """Members plus the constants, iotas and dims that they read."""
        read = {p for n in members for p in self.producers(n)}
        return members | {p for p in read if self.ops[p].opcode in SOURCES}

    def is_legal(self, members: set[int]) -> bool:
        """True when the group's kernel has a loop form that the printers know."""
        kernel = self.kernel(members)
        if not kernel.results:
            return True
        try:
            if any(self.ops[n].opcode in ATTENTION for n in members):
                return attention_form(kernel) is not None
            if any(self.ops[n].opcode in PRIMITIVES for n in members):
                return sole_op(kernel) is not None
            loops = scalarize(kernel)
        except VerifyError:
            return False
        if any(self.ops[n].opcode == "matmul" for n in members):
            return all(product_form(s) is not None for s in loops.segments) or len(members) == 1
        return True

    def depends(self, start: Iterable[int], members: set[int]) -> bool:
        """True when an op of ``start`` outside the group depends on the group."""
        seen: set[int] = set()
        todo = [n for n in start if n not in members]
        while todo:
            n = todo.pop()
            if n in seen:
                continue
            seen.add(n)
            for p in self.producers(n):
                if p in members:
                    return True
                todo.append(p)
                if p in self.owner:
                    todo += self.groups[self.owner[p]] - seen
        return False
