"""The table of pointwise ops: name, number of operands, dtype rule, and what the op means in torch.

Each printer keeps its own column for the same names; a test checks that none is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Pointwise:
    """One elementwise op.

    ``rule`` gives the result dtype: "same" as the operands, "bool" for predicates, "any" for ``cast``
    (the declared result type decides), "select" for ``where`` (that of the last two operands).
    ``domain`` limits operands: "float", "int" (and bool), "bool" or "any".
    """

    name: str
    arity: int
    rule: str
    domain: str
    torch: Callable[..., Any]


def _integer_safe_div(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype.is_floating_point:
        return a / b
    return torch.div(a, b, rounding_mode="floor")


_ROWS = (
    Pointwise("add", 2, "same", "any", lambda a, b: a + b),
    Pointwise("sub", 2, "same", "any", lambda a, b: a - b),
    Pointwise("mul", 2, "same", "any", lambda a, b: a * b),
    # On integers div and mod round towards minus infinity.
    Pointwise("div", 2, "same", "any", _integer_safe_div),
    Pointwise("mod", 2, "same", "any", lambda a, b: torch.remainder(a, b)),
    Pointwise("pow", 2, "same", "float", torch.pow),
    Pointwise("maximum", 2, "same", "any", torch.maximum),
    Pointwise("minimum", 2, "same", "any", torch.minimum),
    Pointwise("neg", 1, "same", "any", torch.neg),
    Pointwise("abs", 1, "same", "any", torch.abs),
    Pointwise("exp", 1, "same", "float", torch.exp),
    Pointwise("log", 1, "same", "float", torch.log),
    Pointwise("sqrt", 1, "same", "float", torch.sqrt),
    Pointwise("rsqrt", 1, "same", "float", torch.rsqrt),
    Pointwise("sin", 1, "same", "float", torch.sin),
    Pointwise("cos", 1, "same", "float", torch.cos),
    Pointwise("tanh", 1, "same", "float", torch.tanh),
    Pointwise("erf", 1, "same", "float", torch.erf),
    Pointwise("sigmoid", 1, "same", "float", torch.sigmoid),
    Pointwise("floor", 1, "same", "float", torch.floor),
    Pointwise("round", 1, "same", "float", torch.round),  # halves to even
    Pointwise("eq", 2, "bool", "any", torch.eq),
    Pointwise("ne", 2, "bool", "any", torch.ne),
    Pointwise("lt", 2, "bool", "any", torch.lt),
    Pointwise("le", 2, "bool", "any", torch.le),
    Pointwise("gt", 2, "bool", "any", torch.gt),
    Pointwise("ge", 2, "bool", "any", torch.ge),
    Pointwise("and", 2, "same", "int", torch.bitwise_and),
    Pointwise("or", 2, "same", "int", torch.bitwise_or),
    Pointwise("xor", 2, "same", "int", torch.bitwise_xor),
    Pointwise("shr", 2, "same", "int", torch.bitwise_right_shift),
    Pointwise("not", 1, "same", "bool", torch.logical_not),
    Pointwise("where", 3, "select", "any", torch.where),
    # The evaluator converts to the declared result type; the table entry is the identity.
    Pointwise("cast", 1, "any", "any", lambda a: a),
)

POINTWISE: dict[str, Pointwise] = {row.name: row for row in _ROWS}
