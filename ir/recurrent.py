"""Recurrent layers: what they remember of the past has one size, however long the past is.

Both ops go on from the state that their slot holds, [B, ...], zeros at the start of a request, and leave the new one
there: the second result *is* the slot's memory. Their values have a row per token, as a product's have.

``causal_conv1d`` takes x[B, S, C], weight[K, C] and, perhaps, bias[C], and gives [B, S, C] in x's type: the sum of
``weight[k, c] * x[b, s - (K - 1) + k, c]`` over k, where tokens before the first of these S are the state's,
[B, K - 1, C], which remembers the last K - 1 tokens of x.

``selective_scan`` takes x, dt [B, S, C], decay[N, C] and input, output [B, S, N], and gives [B, S, C] in x's type: the
recurrence of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023 (A, B and C there are
decay, input and output here), over the state h[B, N, C]:

    h[b, n, c]  =  exp(dt[b, s, c] * decay[n, c]) * h[b, n, c]  +  dt[b, s, c] * x[b, s, c] * input[b, s, n]
    y[b, s, c]  =  sum over n of output[b, s, n] * h[b, n, c]

State and decay are f32, or f64 where x is. Channels come last everywhere, so that neighbours in memory are computed
alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import VerifyError
from .module import Op
from .types import DType, TensorType, Value

RECURRENT = ("causal_conv1d", "selective_scan")


def state_of(op: Op) -> Value | None:
    """The result of an op that lives in the request's state, under the name in ``slot``; None where there is none."""
    if op.opcode == "append":
        return op.result
    return op.results[1] if op.opcode in RECURRENT else None


def wide(dtype: DType) -> DType:
    """The type in which a recurrence over values of ``dtype`` is computed."""
    return DType.f64 if dtype is DType.f64 else DType.f32


def _require(condition: object, op: Op, message: str) -> None:
    if not condition:
        raise VerifyError(f"{op.opcode}: {message}")


def _tokens(op: Op) -> TensorType:
    x = op.operands[0].type
    _require(x.rank == 3 and x.dtype.is_float and x.dtype is not DType.f8, op, f"x is [B, S, C], not {x}")
    _require(op.attr("slot"), op, "its state needs a slot")
    return x


def infer_causal_conv1d(op: Op) -> tuple[TensorType, ...]:
    """Types of the result and the state. Raises VerifyError for operands that do not fit."""
    _require(len(op.operands) in (2, 3), op, f"takes 2 or 3 operands, has {len(op.operands)}")
    x, (weight, *bias) = _tokens(op), op.operands[1:]
    batch, _, channels = x.shape
    taps = weight.shape[0]
    fits = weight.type == TensorType(x.dtype, (taps, channels)) and taps.is_Integer and taps >= 2
    _require(fits, op, f"weight is [K, {channels}] with K of 2 or more, not {weight.type}")
    _require(all(b.type == TensorType(x.dtype, (channels,)) for b in bias), op, f"bias is [{channels}]")
    return x, TensorType(x.dtype, (batch, taps - 1, channels))


def infer_selective_scan(op: Op) -> tuple[TensorType, ...]:
    """Types of the result and the state. Raises VerifyError for operands that do not fit."""
    _require(len(op.operands) == 5, op, f"takes 5 operands, has {len(op.operands)}")
    x, (dt, decay, *ends) = _tokens(op), op.operands[1:]
    batch, tokens, channels = x.shape
    states = decay.shape[0]
    _require(dt.type == x, op, f"dt is {x}, as x is, not {dt.type}")
    fits = decay.type == TensorType(wide(x.dtype), (states, channels)) and states.is_Integer
    _require(fits, op, f"decay is {wide(x.dtype).value}[N, {channels}], not {decay.type}")
    expected = TensorType(x.dtype, (batch, tokens, states))
    _require(all(v.type == expected for v in ends), op, f"input and output are {expected}")
    return x, TensorType(wide(x.dtype), (batch, states, channels))


def causal_conv1d(args: list[Tensor], past: Tensor | None) -> tuple[Tensor, Tensor]:
    """Evaluate the op with its operands ``args``: the result and the new state. No ``past`` is one of zeros."""
    x, weight, *bias = args
    taps, tokens = weight.shape[0], x.shape[1]
    if past is None:
        past = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    seen = torch.cat([past.to(x.dtype), x], dim=1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = sum(seen[:, k : k + tokens].to(dtype) * weight[k].to(dtype) for k in range(taps))
    assert isinstance(total, Tensor)
    for b in bias:
        total = total + b.to(dtype)
    return total.to(x.dtype), seen[:, tokens:]


def selective_scan(args: list[Tensor], past: Tensor | None) -> tuple[Tensor, Tensor]:
    """Evaluate the op with its operands ``args``: the result and the new state. No ``past`` is one of zeros."""
    dtype = torch.promote_types(args[0].dtype, torch.float32)
    x, dt, decay, input, output = (a.to(dtype) for a in args)
    h = x.new_zeros(x.shape[0], *decay.shape) if past is None else past.to(dtype)
    rows = []
    for s in range(x.shape[1]):
        h = torch.exp(dt[:, s, None] * decay) * h + (dt * x)[:, s, None] * input[:, s, :, None]
        rows.append((output[:, s, :, None] * h).sum(1))
    return torch.stack(rows, dim=1).to(args[0].dtype), h
