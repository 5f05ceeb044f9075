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
from .aten_rules_reduce import safe_softmax, softmax


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


# --- convolutions -------------------------------------------------------------------------------------------------


@rule(
    "conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding", "conv3d.padding"
)
def _patches_product(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Result:
    """x[B, C, *sizes], weight[O, C, *kernel] -> [B, O, *counts], where the kernel steps by its own size.

    Then every element belongs to one patch at most, and the convolution is a product of patches,
    [B, *counts, C * kernel], with the weight's rows. Others are left to PyTorch, as is an input without a batch dim.
    """
    kernel = weight.shape[2:]
    dims = len(kernel)
    apart = _per_dim(stride, dims) == kernel
    padded = padding != "valid" if isinstance(padding, str) else any(_per_dim(padding, dims))
    plain = not padded and groups == 1 and all(d == 1 for d in _per_dim(dilation, dims))
    if x.type.rank != dims + 2 or not apart or not plain or not x.dtype.is_float:
        return None
    counts = ctx.out.shape[2:]
    for n, (count, size) in enumerate(zip(counts, kernel, strict=True)):
        x = ctx.narrow(x, 2 + n, 0, sympy.expand(count * size))  # what fills no patch is left out
    split = [d for pair in zip(counts, kernel, strict=True) for d in pair]
    x = ctx.reshape(x, (*x.shape[:2], *split))
    # [B, C, count, size, ...] -> [B, count, ..., C, size, ...]
    x = ctx.permute(x, (0, *range(2, x.type.rank, 2), 1, *range(3, x.type.rank, 2)))
    depth = sympy.prod(weight.shape[1:])
    patches = ctx.reshape(x, (x.shape[0], sympy.prod(counts), depth))
    product = _plus(ctx, _matmul(ctx, patches, ctx.reshape(weight, (weight.shape[0], depth))), bias)
    return ctx.reshape(ctx.transposed(product), ctx.out.shape)


def _per_dim(sizes: int | Sequence[int], dims: int) -> tuple[Expr, ...]:
    """A convolution's argument as one number per dim: a lone number counts for all of them."""
    given = [sizes] if isinstance(sizes, int) else list(sizes)
    return tuple(map(sympy.Integer, given * dims if len(given) == 1 else given))


# --- attention ----------------------------------------------------------------------------------------------------


def opaque_attention(
    ctx: Context,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None,
    sinks: Value | None,
    slopes: Value | None,
    distances: Value | None,
    scale: float,
    softcap: float,
    window: int,
    ahead: int,
    causal: bool,
) -> Value:
    """``tilewright::attention``: q, k, v [B,H,S,D] -> [B,S,H,Dv]; ``ctx.slot`` names the KV state, or is empty."""
    given = {
        "mask": (mask, DType.bool), "sinks": (sinks, q.dtype), "slopes": (slopes, DType.f32),
        "distances": (distances, DType.f32),
    }  # fmt: skip
    extras = {name: ctx.cast(value, dtype) for name, (value, dtype) in given.items() if value is not None}
    out = ctx.builder.add(
        "attention", q, k, v, *extras.values(), extras=tuple(extras) or None, ahead=ahead or None,
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
    return None if dropout_p else attend(ctx, q, k, v, attn_mask, is_causal, scale)


def attend(
    ctx: Context, q: Value, k: Value, v: Value, mask: Value | None, is_causal: bool, scale: float | None
) -> Value | None:
    """PyTorch's scaled dot product attention without dropout; None where its scale depends on a size."""
    size = q.shape[-1]
    if scale is None and not size.is_Integer:
        return None
    factor = 1 / math.sqrt(int(size)) if scale is None else scale
    # PyTorch aligns causality at the first key, the IR at the last: the same only for equally many queries and keys.
    aligned = not is_causal or q.shape[-2] == k.shape[-2]
    if q.type.rank == 4 and mask is None and aligned and q.shape[:1] == k.shape[:1]:
        return ctx.builder.add(
            "attention", q, k, v, scale=factor, softcap=0.0, window=0, causal=is_causal, slot=""
        )
    return _spelled_out_attention(ctx, q, k, v, mask, factor, is_causal)


def _spelled_out_attention(
    ctx: Context, q: Value, k: Value, v: Value, mask: Value | None, scale: float, causal: bool
) -> Value:
    """Any rank, any mask: matmul, mask, softmax, matmul; scores in float32 for half types."""
    scores = attention_scores(ctx, q, k, mask, scale, causal)
    weights = softmax(ctx, scores, -1) if mask is None else safe_softmax(ctx, scores, -1)
    v = _repeat_heads(ctx, v, q)
    return ctx.cast(_matmul(ctx, weights, ctx.transposed(ctx.cast(v, weights.dtype))), q.dtype)


def attention_scores(
    ctx: Context, q: Value, k: Value, mask: Value | None, scale: float, causal: bool
) -> Value:
    """Masked scores [.., S, T]; in float32 for half types."""
    k, wide = _repeat_heads(ctx, k, q), ctx.wide(q.dtype)
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
    return scores


def _repeat_heads(ctx: Context, x: Value, q: Value) -> Value:
    """Grouped queries: each key-value head serves ``heads / groups`` query heads in a row."""
    at = x.type.rank - 3
    if at < 0 or x.shape[at] == q.shape[at]:
        return x
    heads = q.shape[at]
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
