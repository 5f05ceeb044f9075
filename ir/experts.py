"""A layer of experts: each token goes through the few of many small networks that a router chose for it.

``experts`` takes x[.., K], ids int[.., k], scores float[.., k], gate_up [E, 2I, K], down [E, K, I] and extras, and
gives [.., K] in x's type: for each token, the sum over its k chosen experts e of

    score * (down[e] @ h + down_bias[e])   where   gate, up = gate_up[e] @ x + gate_up_bias[e]
                                                   h = act(gate) * (up + offset)

Rows of gate_up are all gates, then all ups; ``interleaved``, they take turns. With ``transposed``, the weights lie as
[E, K, 2I] and [E, I, K]. ``activation`` names act, one of ``ACTIVATIONS``; "silu" is gate * sigmoid(alpha * gate).
Where there is a ``limit``, gate is at most that before it is activated, and up within plus and minus that (the form of
gpt-oss). ``extras`` names the biases that follow down, gate_up_bias [E, 2I] and down_bias [E, K], in that order.
An id outside [0, E) has no meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor

from .errors import VerifyError
from .module import Op
from .types import DType, TensorType

T = TypeVar("T")

EXPERTS_EXTRAS = ("gate_up_bias", "down_bias")
EXPERTS_ATTRS = {
    "activation": "str", "alpha": "float", "limit": "float", "offset": "float",
    "interleaved": "bool", "transposed": "bool", "extras": "names",
}  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def experts_extras(op: Op, operands: Sequence[T]) -> dict[str, T]:
    """The biases of an experts op, by name. ``operands``: its own, or what stands for each of them."""
    return dict(zip(op.attr("extras", ()), operands[5:], strict=True))


@dataclass(frozen=True)
class Gate:
    """How gate and up become the values that ``down`` multiplies; see the module's docstring."""

    activation: str
    alpha: float = 1.0
    limit: float = 0.0
    offset: float = 0.0
    interleaved: bool = False

    @staticmethod
    def of(op: Op) -> Gate:
        """The gate that an op's attributes describe."""
        return Gate(
            str(op.attr("activation")),
            float(op.attr("alpha", 1.0)),
            float(op.attr("limit", 0.0)),
            float(op.attr("offset", 0.0)),
            bool(op.attr("interleaved", False)),
        )

    def attrs(self) -> dict[str, Any]:
        """Attributes of an op that has this gate."""
        return {
            "activation": self.activation,
            "alpha": self.alpha if self.alpha != 1.0 else None,
            "limit": self.limit or None,
            "offset": self.offset or None,
            "interleaved": self.interleaved or None,
        }

    def __call__(self, gate_up: Tensor) -> Tensor:
        """[.., 2I] -> [.., I]."""
        gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if self.interleaved else gate_up.chunk(2, dim=-1)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self._activated(gate) * (up + self.offset if self.offset else up)

    def _activated(self, x: Tensor) -> Tensor:
        match self.activation:
            case "gelu":
                return torch.nn.functional.gelu(x)
            case "gelu_tanh":
                return torch.nn.functional.gelu(x, approximate="tanh")
            case "relu":
                return torch.relu(x)
        return x * torch.sigmoid(x * self.alpha)


def infer_experts(op: Op) -> tuple[TensorType, ...]:
    """The type of the result. Raises VerifyError on misuse."""

    def need(condition: object, message: str) -> None:
        if not condition:
            raise VerifyError(f"experts: {message}")

    extras = op.attr("extras", ())
    count = 5 + len(extras)
    need(len(op.operands) == count, f"takes {count} operands, has {len(op.operands)}")
    x, ids, scores, gate_up, down = op.operands[:5]
    need(x.type.rank >= 1, "x needs rank 1 or more")
    need(x.dtype.is_float and x.dtype is not DType.f8, f"cannot compute in {x.dtype.value}")
    need(ids.dtype.is_int, "ids must be integer")
    need(scores.dtype.is_float and scores.dtype is not DType.f8, "scores must be float")
    need(
        ids.shape == scores.shape and ids.shape[:-1] == x.shape[:-1] and ids.type.rank == x.type.rank,
        f"ids and scores do not fit: {x.type}, {ids.type}, {scores.type}",
    )
    need(gate_up.type.rank == 3 and down.type.rank == 3, "weights need rank 3")
    rows, columns = (2, 1) if op.attr("transposed", False) else (1, 2)
    number, depth, inner = gate_up.shape[0], x.shape[-1], down.shape[columns]
    sizes = (number, depth, inner, ids.shape[-1])
    need(all(n.is_Integer and n > 0 for n in sizes), "experts, K, I and k must be known")
    need(gate_up.shape[rows] == 2 * inner, f"gate_up must have twice the {inner} columns of down")
    need(gate_up.shape[columns] == depth, f"K differs: {x.type} and {gate_up.type}")
    need(
        down.shape[0] == number and down.shape[rows] == depth, f"weights differ: {gate_up.type}, {down.type}"
    )
    need(
        extras == tuple(n for n in EXPERTS_EXTRAS if n in extras),
        f"extras are some of {EXPERTS_EXTRAS}, in order",
    )
    need(op.attr("extras") != (), "extras are left out where there are none")
    shapes: dict[str, tuple[sympy.Expr, ...]] = {
        "gate_up_bias": (number, 2 * inner),
        "down_bias": (number, depth),
    }
    for name, value in experts_extras(op, op.operands).items():
        need(value.shape == shapes[name], f"{name} must be {shapes[name]}, not {value.type}")
    need(
        all(v.dtype == x.dtype for v in (gate_up, down, *op.operands[5:])), f"weights must be {x.dtype.value}"
    )
    gate = Gate.of(op)
    need(gate.activation in ACTIVATIONS, f"unknown activation {gate.activation!r}")
    need(gate.alpha == 1.0 or gate.activation == "silu", "alpha belongs to silu")
    need(gate.limit >= 0, "limit must not be negative")
    return (x.type,)


def experts(op: Op, operands: Sequence[Tensor]) -> Tensor:
    """What the op means: products in x's type, as eager has them, and the sum over experts in float32 or wider."""
    x, ids, scores, gate_up, down = operands[:5]
    extras, gate = experts_extras(op, operands), Gate.of(op)
    if op.attr("transposed", False):
        gate_up, down = gate_up.mT, down.mT
    rows, flat = x.reshape(-1, x.shape[-1]), ids.reshape(-1, ids.shape[-1])
    weights = scores.reshape(flat.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(rows.shape, dtype=wide, device=x.device)
    for e in flat.unique().tolist():
        token, place = torch.where(flat == e)
        hidden = rows[token] @ gate_up[e].mT
        if "gate_up_bias" in extras:
            hidden = hidden + extras["gate_up_bias"][e]
        out = gate(hidden) @ down[e].mT
        if "down_bias" in extras:
            out = out + extras["down_bias"][e]
        total.index_add_(0, token, (out * weights[token, place, None]).to(wide))
    return total.to(x.dtype).reshape(x.shape)
