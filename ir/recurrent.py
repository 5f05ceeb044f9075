"""Recurrent layers: what they remember of the past has one size, however long the past is.

All of them go on from the state that their slot holds, [B, ...], zeros at the start of a request, and leave the new one
there: the second result *is* the slot's memory. Their values have a row per token, as a product's have.

``causal_conv1d`` takes x[B, S, C], weight[K, C] and, perhaps, bias[C], and gives [B, S, C] in x's type: the sum of
``weight[k, c] * x[b, s - (K - 1) + k, c]`` over k, where tokens before the first of these S are the state's,
[B, K - 1, C], which remembers the last K - 1 tokens of x.

``selective_scan`` takes x, dt [B, S, C], decay[N, C] and input, output [B, S, N], and gives [B, S, C] in x's type: the
recurrence of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023 (A, B and C there are
decay, input and output here), over the state h[B, N, C]:

    h[b, n, c]  =  exp(dt[b, s, c] * decay[n, c]) * h[b, n, c]  +  dt[b, s, c] * x[b, s, c] * input[b, s, n]
    y[b, s, c]  =  sum over n of output[b, s, n] * h[b, n, c]

``linear_attention`` takes q, k [B, S, G, N], v[B, S, H, D], decay[B, S, H, 1 or N] and, perhaps, beta[B, S, H], and
gives [B, S, H, D] in v's type. Each head keeps a matrix h[N, D] in which it looks values up by keys; head i has the
queries and keys of group ``i // (H // G)``. For each token the matrix fades, takes in a value at its key, and is read
at the query:

    h[n, d]  =  exp(decay[n]) * h[n, d]
    u[d]     =  v[d], or with beta: beta * (v[d] - sum over n of k[n] * h[n, d])
    h[n, d]  =  h[n, d] + k[n] * u[d]
    y[d]     =  sum over n of q[n] * h[n, d]

That is gated linear attention (Katharopoulos et al., "Transformers are RNNs", 2020; Yang et al., "Gated Linear
Attention Transformers with Hardware-Efficient Training", 2023), of which Mamba-2 is one (Dao and Gu, "Transformers are
SSMs", 2024), and with beta the gated delta rule (Yang et al., "Gated Delta Networks", 2024), which first takes away
what it finds at the key. A decay of one number per token and head is that of Mamba-2 and Gated DeltaNet, one of N that
of Kimi Linear.

State and decay are f32, or f64 where x or v is, and so are the other operands of ``linear_attention`` but v. Channels
come last everywhere, so that neighbours in memory are computed alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import VerifyError
from .module import Op
from .types import DType, TensorType, Value

RECURRENT = ("causal_conv1d", "selective_scan", "linear_attention")


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


def infer_linear_attention(op: Op) -> tuple[TensorType, ...]:
    """Types of the result and the state. Raises VerifyError for operands that do not fit."""
    _require(len(op.operands) in (4, 5), op, f"takes 4 or 5 operands, has {len(op.operands)}")
    _require(op.attr("slot"), op, "its state needs a slot")
    q, k, v, decay, *beta = (x.type for x in op.operands)
    fits = v.rank == 4 and v.dtype.is_float and v.dtype is not DType.f8
    _require(fits, op, f"v is [B, S, H, D], not {v}")
    batch, tokens, heads, depth = v.shape
    dtype = wide(v.dtype)
    groups, size = q.shape[2:] if q.rank == 4 else (heads, 0)
    fits = q == k == TensorType(dtype, (batch, tokens, groups, size)) and size.is_Integer and depth.is_Integer
    _require(fits, op, f"q and k are {dtype.value}[{batch}, {tokens}, G, N], not {q} and {k}")
    _require(
        heads.is_Integer and groups.is_Integer and heads % groups == 0,
        op,
        f"{groups} groups of {heads} heads",
    )
    rates = [TensorType(dtype, (batch, tokens, heads, n)) for n in (1, size)]
    _require(decay in rates, op, f"decay is {rates[0]} or {rates[1]}, not {decay}")
    expected = TensorType(dtype, (batch, tokens, heads))
    _require(all(b == expected for b in beta), op, f"beta is {expected}")
    return v, TensorType(dtype, (batch, heads, size, depth))


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


def linear_attention(args: list[Tensor], past: Tensor | None) -> tuple[Tensor, Tensor]:
    """Evaluate the op with its operands ``args``: the result and the new state. No ``past`` is one of zeros."""
    dtype = torch.promote_types(args[2].dtype, torch.float32)
    q, k, v, decay, *beta = (a.to(dtype) for a in args)
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2)[..., None] for x in (q, k))
    h = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3]) if past is None else past.to(dtype)
    rows = []
    for s in range(v.shape[1]):
        h = torch.exp(decay[:, s, :, :, None]) * h
        taken_in = v[:, s]
        for b in beta:
            taken_in = b[:, s, :, None] * (taken_in - (k[:, s] * h).sum(2))
        h = h + k[:, s] * taken_in[:, :, None]
        rows.append((q[:, s] * h).sum(2))
    return torch.stack(rows, dim=1).to(args[2].dtype), h


EVALUATE = {
    "causal_conv1d": causal_conv1d,
    "selective_scan": selective_scan,
    "linear_attention": linear_attention,
}
"""By opcode: operands and past state to the result and the new state."""
