"""What type inference asks of an op; each failure is a VerifyError that names the op."""

from __future__ import annotations

from .errors import VerifyError
from .module import Op


def need(condition: object, op: Op, message: str) -> None:
    """Raises VerifyError with the message unless the condition holds."""
    if not condition:
        raise VerifyError(f"{op.opcode}: {message}")


def arity(op: Op, *counts: int) -> None:
    """Raises VerifyError unless the op has so many operands."""
    need(
        len(op.operands) in counts,
        op,
        f"takes {' or '.join(map(str, counts))} operands, has {len(op.operands)}",
    )
