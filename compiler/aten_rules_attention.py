"""Attention: one IR op wherever it can be, with masks and biases as its operands; else two products and a softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sympy import Expr, Integer

from tilewright.ir.attention import ATTENTION_EXTRAS, LARGEST_HEAD
from tilewright.ir.errors import LoweringError
from tilewright.ir.index import FloorDiv, index_symbols, sym
from tilewright.ir.ops import broadcast
from tilewright.ir.types import DType, Value

from .aten_rules import Context, Result, rule
from .aten_rules_matmul import matrix_product
from .aten_rules_reduce import log_sum_exp, safe_softmax, softmax


def opaque_attention(
    ctx: Context,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None,
    sinks: Value | None,
    slopes: Value | None,
    distances: Value | None,
    bias: Value | None,
    scale: float,
    softcap: float,
    window: int,
    ahead: int,
    causal: bool,
) -> Value:
    """``tilewright::attention``: q, k, v [B,H,S,D] -> [B,S,H,Dv]; ``ctx.slot`` names the KV state, or is empty. mask:
    bool[B, T], or an array of any type that broadcasts to [B, H, S, T], as ``bias`` does.

    Raises LoweringError where such an array is over other keys.
    """
    given = {
        "mask": (mask, DType.bool), "sinks": (sinks, q.dtype), "slopes": (slopes, DType.f32),
        "distances": (distances, DType.f32),
    }  # fmt: skip
    arrays = [array for array in (mask, bias) if array is not None and array.type.rank > 2]
    keys = sym("T") if ctx.slot else k.shape[2]
    found = extras_of(ctx, arrays, (*q.shape[:3], keys), q.dtype)
    if found is None:
        raise LoweringError(f"attention over keys {k.type} cannot have a mask or bias {arrays[0].type}")
    found |= {
        name: ctx.cast(value, dtype)
        for name, (value, dtype) in given.items()
        if value is not None and value not in arrays
    }
    return ctx.permute(_attention(ctx, q, k, v, found, scale, softcap, window, ahead, causal), (0, 2, 1, 3))


def _attention(
    ctx: Context,
    q: Value,
    k: Value,
    v: Value,
    extras: dict[str, Value],
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    ahead: int = 0,
    causal: bool = False,
) -> Value:
    names = tuple(name for name in ATTENTION_EXTRAS if name in extras)
    return ctx.builder.add(
        "attention", q, k, v, *(extras[name] for name in names), extras=names or None, ahead=ahead or None,
        scale=scale, softcap=softcap, window=window, causal=causal, slot=ctx.slot,
    )  # fmt: skip


# --- masks and biases as operands ---------------------------------------------------------------------------------


def extras_of(
    ctx: Context, arrays: Sequence[Value], scores: tuple[Expr, ...], dtype: DType
) -> dict[str, Value] | None:
    """Masks (bool) and biases (floats) that broadcast to ``scores`` [B, H, S, T] as an attention's ``mask`` and
    ``bias``; None where they are larger than the scores."""
    batch, _, _, keys = scores
    total: Value | None = None
    masks: list[Value] = []
    for array in arrays:
        for _ in range(4 - array.type.rank):
            array = ctx.unsqueeze(array, 0)
        fits = all(d in (1, n) for d, n in zip(array.shape, scores, strict=False))
        if array.type.rank > 4 or not fits:
            return None
        array = ctx.expand(array, (*array.shape[:3], keys))
        if array.dtype is DType.bool and array.shape[1:3] == (1, 1):
            masks.append(ctx.expand(ctx.drop(array, (1, 2)), (batch, keys)))
            continue
        if array.dtype is DType.bool:
            array = ctx.apply("where", array, 0.0, -math.inf, dtype=dtype)
        else:
            array = ctx.cast(array, dtype)
        total = array if total is None else ctx.apply("add", total, array)
    found = {} if total is None else {"bias": total}
    for mask in masks:
        found["mask"] = ctx.apply("and", found["mask"], mask) if "mask" in found else mask
    return found


# --- PyTorch's ----------------------------------------------------------------------------------------------------


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


@rule("_scaled_dot_product_flash_attention_for_cpu.default")
def _flash_attention(
    ctx: Context,
    q: Value,
    k: Value,
    v: Value,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Value | None = None,
    scale: float | None = None,
) -> Result:
    """q [B,H,S,D], k, v [B,G,T,D] -> out [B,H,S,D] and the log of each row's sum, f32[B,H,S] (rarely asked for), which
    PyTorch says is 0 where a mask hides every key."""
    out = attend(ctx, q, k, v, attn_mask, is_causal, scale)
    if dropout_p or out is None:
        return None
    factor = 1 / math.sqrt(int(q.shape[-1])) if scale is None else scale
    scores = _scores(ctx, q, k, attn_mask, factor, is_causal)
    logs = log_sum_exp(ctx, scores, [scores.type.rank - 1], False)
    logs = ctx.apply("where", ctx.apply("eq", logs, -math.inf), 0, logs, dtype=logs.dtype)
    return out, ctx.cast(logs, ctx.outs[1].dtype)


def attend(
    ctx: Context, q: Value, k: Value, v: Value, mask: Value | None, is_causal: bool, scale: float | None
) -> Value | None:
    """PyTorch's scaled dot product attention without dropout; None where its scale depends on a size."""
    size = q.shape[-1]
    if scale is None and not size.is_Integer:
        return None
    factor = 1 / math.sqrt(int(size)) if scale is None else scale
    # PyTorch aligns causality at the first key, the IR at the last: the same only for equally many queries and keys.
    aligned = is_causal and q.shape[-2] == k.shape[-2]
    masks = [mask] if mask is not None else []
    if is_causal and not aligned:
        masks.append(_not_after(ctx, q.shape[-2:-1] + k.shape[-2:-1]))
    out = _as_one_op(ctx, q, k, v, masks, factor, aligned)
    return out if out is not None else _spelled_out(ctx, q, k, v, mask, factor, is_causal)


def _as_one_op(
    ctx: Context, q: Value, k: Value, v: Value, masks: Sequence[Value], scale: float, causal: bool
) -> Value | None:
    """The IR's op for q, k and v of rank 3 or 4; None where it cannot take them."""
    if q.type.rank == 3 and k.type.rank == v.type.rank == 3:
        q, k, v = (ctx.unsqueeze(x, 1) for x in (q, k, v))
        masks = [ctx.unsqueeze(m, 1) if m.type.rank == 3 else m for m in masks]
        out = _as_one_op(ctx, q, k, v, masks, scale, causal)
        return None if out is None else ctx.drop(out, (1,))
    sizes = (q.shape[-1], v.shape[-1])
    if {q.type.rank, k.type.rank, v.type.rank} != {4} or any(
        not d.is_Integer or d > LARGEST_HEAD for d in sizes
    ):
        return None
    heads, groups = q.shape[1], k.shape[1]
    whole = heads.is_Integer and groups.is_Integer and heads % groups == 0
    if not whole or k.shape[:3] != v.shape[:3]:
        return None
    batch = broadcast([q.shape[:1], k.shape[:1]])
    q, k, v = (ctx.expand(x, (*batch, *x.shape[1:])) for x in (q, k, v))
    extras = extras_of(ctx, masks, (*q.shape[:3], k.shape[2]), q.dtype)
    return None if extras is None else _attention(ctx, q, k, v, extras, scale, causal=causal)


def _spelled_out(
    ctx: Context, q: Value, k: Value, v: Value, mask: Value | None, scale: float, causal: bool
) -> Value:
    """Any rank, any mask: matmul, mask, softmax, matmul; scores in float32 for half types."""
    scores = _scores(ctx, q, k, mask, scale, causal)
    weights = softmax(ctx, scores, -1) if mask is None else safe_softmax(ctx, scores, -1)
    v = _repeat_heads(ctx, v, q)
    return ctx.cast(matrix_product(ctx, weights, ctx.transposed(ctx.cast(v, weights.dtype))), q.dtype)


def _scores(ctx: Context, q: Value, k: Value, mask: Value | None, scale: float, causal: bool) -> Value:
    """Masked scores [.., S, T]; in float32 for half types."""
    k, wide = _repeat_heads(ctx, k, q), ctx.wide(q.dtype)
    scores = ctx.apply("mul", matrix_product(ctx, ctx.cast(q, wide), ctx.cast(k, wide)), scale)
    if causal:
        seen = _not_after(ctx, scores.shape[-2:])
        scores = ctx.apply("where", seen, scores, ctx.const(-math.inf, wide))
    if mask is not None and mask.dtype is DType.bool:
        scores = ctx.apply("where", mask, scores, ctx.const(-math.inf, wide))
    elif mask is not None:
        scores = ctx.apply("add", scores, ctx.cast(mask, wide))
    return scores


def _not_after(ctx: Context, shape: tuple[Expr, ...]) -> Value:
    """bool[S, T]: whether a key comes no later than a query, both counted from the first."""
    rows, columns = (ctx.positions(size, shape, at) for at, size in enumerate(shape))
    return ctx.apply("le", columns, rows)


def _repeat_heads(ctx: Context, x: Value, q: Value) -> Value:
    """Grouped queries: each key-value head serves ``heads / groups`` query heads in a row."""
    at = x.type.rank - 3
    if at < 0 or x.shape[at] == q.shape[at]:
        return x
    heads = q.shape[at]
    symbols: list[Expr] = list(index_symbols(x.type.rank))
    symbols[at] = FloorDiv(symbols[at], Integer(int(heads) // int(x.shape[at])))
    shape: Sequence[Expr] = [heads if n == at else d for n, d in enumerate(x.shape)]
    return ctx.view(x, shape, symbols)
