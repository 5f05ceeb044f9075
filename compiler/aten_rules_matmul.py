"""Matrix products, attention and experts. The IR's ``matmul`` has K last on both sides, as ``linear`` does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
from sympy import Expr

from tilewright.ir.experts import Gate
from tilewright.ir.index import FloorDiv, index_symbols
from tilewright.ir.ops import broadcast
from tilewright.ir.types import DType, Value

from .aten_rules import Context, Number, Result, rule
from .aten_rules_reduce import softmax


def _matmul(ctx: Context, a: Value, b: Value) -> Value:
    """a[.., M, K] @ b[.., N, K], with batch dims broadcast."""
    if b.type.rank > 2:
        batch = broadcast([a.shape[:-2], b.shape[:-2]])
        a, b = (ctx.expand(x, (*batch, *x.shape[-2:])) for x in (a, b))
    return ctx.builder.add("matmul", a, b)


def _plus(ctx: Context, x: Value, bias: Value | None) -> Value:
    return x if bias is None else ctx.apply("add", x, bias)


@rule("linear.default")
def _linear(ctx: Context, x: Value, weight: Value, bias: Value | None = None) -> Result:
    if not x.dtype.is_float:
        return None
    if weight.type.rank == 1:
        return _plus(ctx, _product(ctx, x, weight), bias)
    return _plus(ctx, _matmul(ctx, x, weight), bias)


def _product(ctx: Context, a: Value, b: Value) -> Value:
    """``torch.matmul``: vectors are rows on the left and columns on the right."""
    left = ctx.unsqueeze(a, 0) if a.type.rank == 1 else a
    right = ctx.unsqueeze(b, 0) if b.type.rank == 1 else ctx.transposed(b)
    out = _matmul(ctx, left, right)
    if b.type.rank == 1:
        out = ctx.drop(out, [out.type.rank - 1])
    if a.type.rank == 1:
        out = ctx.drop(out, [out.type.rank - (1 if b.type.rank == 1 else 2)])
    return out


@rule("matmul.default", "mm.default", "bmm.default", "mv.default", "dot.default")
def _torch_matmul(ctx: Context, a: Value, b: Value) -> Result:
    return _product(ctx, a, b) if a.dtype.is_float else None


@rule("addmm.default", "baddbmm.default", "addmv.default")
def _addmm(ctx: Context, bias: Value, a: Value, b: Value, beta: Number = 1, alpha: Number = 1) -> Result:
    if not a.dtype.is_float:
        return None
    product = _product(ctx, a, b)
    if alpha != 1:
        product = ctx.apply("mul", product, alpha)
    if beta == 0:
        return product
    return ctx.apply("add", product, bias if beta == 1 else ctx.apply("mul", bias, beta))


# --- attention ----------------------------------------------------------------------------------------------------


def opaque_attention(
    ctx: Context,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None,
    sinks: Value | None,
    slopes: Value | None,
    scale: float,
    softcap: float,
    window: int,
    causal: bool,
) -> Value:
    """``tilewright::attention``: q, k, v [B,H,S,D] -> [B,S,H,Dv]; ``ctx.slot`` names the KV state, or is empty."""
    given = {"mask": (mask, DType.bool), "sinks": (sinks, q.dtype), "slopes": (slopes, DType.f32)}
    extras = {name: ctx.cast(value, dtype) for name, (value, dtype) in given.items() if value is not None}
    out = ctx.builder.add(
        "attention", q, k, v, *extras.values(), extras=tuple(extras) or None,
        scale=scale, softcap=softcap, window=window, causal=causal, slot=ctx.slot,
    )  # fmt: skip
    return ctx.permute(out, (0, 2, 1, 3))


@rule("scaled_dot_product_attention.default")
def _sdpa(
    ctx: Context,
    q: Value,
    k: Value,
    v: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Result:
    if dropout_p:
        return None
    size = q.shape[-1]
    if scale is None and not size.is_Integer:
        return None
    factor = 1 / math.sqrt(int(size)) if scale is None else scale
    # PyTorch aligns causality at the first key, the IR at the last: the same only for equally many queries and keys.
    aligned = not is_causal or q.shape[-2] == k.shape[-2]
    if q.type.rank == 4 and attn_mask is None and aligned and q.shape[:1] == k.shape[:1]:
        return ctx.builder.add(
            "attention", q, k, v, scale=factor, softcap=0.0, window=0, causal=is_causal, slot=""
        )
    return _spelled_out_attention(ctx, q, k, v, attn_mask, factor, is_causal)


def _spelled_out_attention(
    ctx: Context, q: Value, k: Value, v: Value, mask: Value | None, scale: float, causal: bool
) -> Value:
    """Any rank, any mask: matmul, mask, softmax, matmul; scores in float32 for half types."""
    if q.type.rank >= 3 and k.shape[-3] != q.shape[-3]:
        k, v = (_repeat_heads(ctx, x, q.shape[-3]) for x in (k, v))
    wide = ctx.wide(q.dtype)
    scores = ctx.apply("mul", _matmul(ctx, ctx.cast(q, wide), ctx.cast(k, wide)), scale)
    if causal:
        rank = scores.type.rank
        rows = ctx.positions(scores.shape[-2], scores.shape, rank - 2)
        columns = ctx.positions(scores.shape[-1], scores.shape, rank - 1)
        scores = ctx.apply("where", ctx.apply("le", columns, rows), scores, ctx.const(-math.inf, wide))
    if mask is not None and mask.dtype is DType.bool:
        scores = ctx.apply("where", mask, scores, ctx.const(-math.inf, wide))
    elif mask is not None:
        scores = ctx.apply("add", scores, ctx.cast(mask, wide))
    weights = softmax(ctx, scores, -1)
    return ctx.cast(_matmul(ctx, weights, ctx.transposed(ctx.cast(v, wide))), q.dtype)


def _repeat_heads(ctx: Context, x: Value, heads: Expr) -> Value:
    """Grouped queries: each key-value head serves ``heads / groups`` query heads in a row."""
    at = x.type.rank - 3
    symbols: list[Expr] = list(index_symbols(x.type.rank))
    symbols[at] = FloorDiv(symbols[at], sympy.Integer(int(heads) // int(x.shape[at])))
    shape: Sequence[Expr] = [heads if n == at else d for n, d in enumerate(x.shape)]
    return ctx.view(x, shape, symbols)


# --- experts ------------------------------------------------------------------------------------------------------


def opaque_experts(
    ctx: Context,
    x: Value,
    ids: Value,
    scores: Value,
    gate_up: Value,
    down: Value,
    gate_up_bias: Value | None,
    down_bias: Value | None,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    interleaved: bool,
    transposed: bool,
) -> Value:
    """``tilewright::experts``: x[N, K], ids and scores [N, k], stacked weights -> [N, K]."""
    given = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    extras = {name: value for name, value in given.items() if value is not None}
    gate = Gate(activation, alpha, limit, offset, interleaved)
    return ctx.builder.add(
        "experts", x, ids, scores, gate_up, down, *extras.values(),
        extras=tuple(extras) or None, transposed=transposed or None, **gate.attrs(),
    )  # fmt: skip
