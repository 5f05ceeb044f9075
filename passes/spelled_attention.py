"""Finds attention that a function spells out: a product, what is done to its scores, a softmax, and another product."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sympy import Expr

from tilewright.ir.index import reshape_map
from tilewright.ir.module import Function, Op
from tilewright.ir.types import Value

Lead = tuple[Expr, ...]
"""The dims of a tensor before its last two."""
_HIDES = -1e3
"""A score in place of others that leaves a key no weight beside any that is seen, if the softmax is taken of it so."""


@dataclass(frozen=True)
class Step:
    """What is done to scores whose dims before the last two are ``lead``.

    kind: ``scale`` by the number ``factor``; ``mul`` or ``div`` each row by ``term`` [.., 1]; ``add`` or ``sub`` what
    ``term`` has for each score; or hide the scores where the condition ``term`` is true (``hide``) or false (``keep``).
    """

    lead: Lead
    kind: str
    term: Value | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class SpelledAttention:
    """An attention: the product of scores, the steps after it, in order, and the dims before the last two of what the
    softmax is taken of; the product with values."""

    scores: Op
    steps: tuple[Step, ...]
    lead: Lead
    values: Op


class Finder:
    """Follows values of a function upwards, through ops whose results nothing else uses."""

    def __init__(self, function: Function) -> None:
        self.made = function.definitions()
        self.uses = Counter(v for op in function.ops for v in op.operands)
        self.uses.update(function.returns)

    def attention(self, values: Op) -> SpelledAttention | None:
        """The attention whose product with values this is."""
        weights = self._plain(values.operands[0])
        division = self.made.get(weights)
        if self.uses[weights] != 1:
            return None
        if values.operands[1].type.rank < 3 or division is None or division.opcode != "div":
            return None
        scores = self._softmax(division)
        chain = self._chain(scores, uses=2) if scores is not None else None
        if scores is None or chain is None:
            return None
        product, steps = chain
        return SpelledAttention(product, steps, scores.shape[:-2], values)

    def _plain(self, value: Value) -> Value:
        """What a value is, but for casts of floats and merged or split dims."""
        op = self.made.get(value)
        while op is not None and self.uses[value] == 1 and _is_same(op):
            value = op.operands[0]
            op = self.made.get(value)
        return value

    def _softmax(self, division: Op) -> Value | None:
        """What a division is the softmax of, along the last dim."""
        weights, total = (self.made.get(v) for v in division.operands)
        if weights is None or weights.opcode != "exp" or self.uses[weights.result] != 2:
            return None
        if total is not None and total.opcode == "where":  # a row without any weight is divided by one
            none, one, given = total.operands
            is_none = self._is_zero(none, given) and self._number(one) == 1
            total = self.made.get(given) if is_none else None
        less = self.made.get(weights.operands[0])
        if total is None or less is None or less.opcode != "sub" or self.uses[less.result] != 1:
            return None
        top = self.made.get(less.operands[1])
        if top is not None and top.opcode == "maximum":
            top = next((o for v in top.operands if (o := self.made.get(v)) and o.opcode == "reduce"), None)
        if less.operands[1].shape[-1:] != (1,) or less.result.shape != less.operands[0].shape:
            return None
        ends = ((total, "sum", weights.result), (top, "max", less.operands[0]))
        if all(op is not None and _is_row(op, kind, x) for op, kind, x in ends):
            return less.operands[0]
        return None

    def _is_zero(self, condition: Value, value: Value) -> bool:
        """Whether a condition is that a value is zero."""
        op = self.made.get(condition)
        if op is None or op.opcode != "eq" or value not in op.operands:
            return False
        return 0 in [self._number(v) for v in op.operands if v != value]

    def _chain(
        self, value: Value, uses: int = 1, later: float | None = 1.0
    ) -> tuple[Op, tuple[Step, ...]] | None:
        """The product that a value is made of, and the steps from it to the value. ``later``: what the value is
        multiplied by before the softmax, None where that is not known."""
        op = self.made.get(value)
        if op is None or self.uses[value] != uses:
            return None
        if op.opcode == "matmul" and not op.attr("activation_group"):
            return (op, ()) if op.operands[1].type.rank == op.operands[0].type.rank > 2 else None
        if _is_same(op):
            return self._chain(op.operands[0], later=later)
        for n, step in self._steps(op, later):
            if op.operands[n].shape != value.shape:
                continue
            factor = None if later is None or step.kind in ("mul", "div") else later * step.factor
            if (rest := self._chain(op.operands[n], later=factor)) is not None:
                return rest[0], (*rest[1], step)
        return None

    def _steps(self, op: Op, later: float | None) -> list[tuple[int, Step]]:
        """Each operand of an op that may be the scores, and what the op then does to them. A number hides scores by
        what later factors make of it."""
        numbers = [self._number(v) for v in op.operands]
        found: list[tuple[int, str, int]] = []  # which operand, what is done to it, by which other one
        match op.opcode:
            case "mul" | "add":
                found = [(0, op.opcode, 1), (1, op.opcode, 0)]
            case "div" | "sub":
                found = [(0, op.opcode, 1)]
            case "where":
                low = [n is not None and later is not None and n * later <= _HIDES for n in numbers]
                found = [(2, "hide", 0)] * low[1] + [(1, "keep", 0)] * low[2]
        steps: list[tuple[int, Step]] = []
        for scores, kind, other in found:
            term, number, lead = op.operands[other], numbers[other], op.result.shape[:-2]
            if kind not in ("mul", "div"):
                steps.append((scores, Step(lead, kind, term)))
            elif number:
                steps.append((scores, Step(lead, "scale", factor=number if kind == "mul" else 1 / number)))
            elif number is None and (term.type.rank == 0 or term.shape[-1] == 1):
                steps.append((scores, Step(lead, kind, term)))
        return steps

    def _number(self, value: Value) -> float | None:
        """What a value is that is one number, known now."""
        op = self.made.get(value)
        while op is not None and op.opcode == "cast":
            op = self.made.get(op.operands[0])
        return float(op.attr("value")) if op is not None and op.opcode == "const" else None


def _is_same(op: Op) -> bool:
    """Whether an op gives the same numbers as floats of another type, or with other dims before the last two."""
    if op.opcode == "cast":
        return op.operands[0].dtype.is_float and op.result.dtype.is_float
    if op.opcode != "view" or op.operands[0].type.rank < 2:
        return False
    old, new = op.operands[0].shape, op.result.shape
    return old[-2:] == new[-2:] and op.attr("map") == reshape_map(old, new)


def _is_row(op: Op, kind: str, x: Value) -> bool:
    """Whether an op reduces each row of x to one number."""
    last = (x.type.rank - 1,)
    return (
        op.opcode == "reduce"
        and op.attr("kind") == kind
        and op.operands[0] == x
        and op.attr("axes") == last
        and bool(op.attr("keepdim"))  # else a row's number would meet another axis
    )
