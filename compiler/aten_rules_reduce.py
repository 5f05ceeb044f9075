"""Reductions, and the norms and softmax that are built from them. Half precision is reduced in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from tilewright.ir.types import DType, Value

from .aten_rules import Context, Result, axes_of, axis, rule

Dims = int | Sequence[int] | None


def _sum(ctx: Context, x: Value, axes: Sequence[int], keepdim: bool) -> Value:
    """The sum in the result's type (integers add up in int64), accumulated in float32 for half types."""
    wide = ctx.wide(ctx.out.dtype)
    return ctx.cast(ctx.reduce("sum", ctx.cast(x, wide), axes, keepdim), ctx.out.dtype)


@rule("sum.default")
def _sum_all(ctx: Context, x: Value, dtype: Any = None) -> Result:
    return _sum(ctx, x, range(x.type.rank), False)


@rule("sum.dim_IntList")
def _sum_dims(ctx: Context, x: Value, dim: Dims, keepdim: bool = False, dtype: Any = None) -> Result:
    return _sum(ctx, x, axes_of(dim, x.type.rank), keepdim)


def _count(x: Value, axes: Sequence[int]) -> sympy.Expr:
    return sympy.prod([x.shape[n] for n in axes], start=sympy.Integer(1))


def _mean(ctx: Context, x: Value, axes: Sequence[int], keepdim: bool) -> Value:
    """The mean of a tensor that is wide enough already."""
    return ctx.apply("div", ctx.reduce("sum", x, axes, keepdim), _count(x, axes))


@rule("mean.default")
def _mean_all(ctx: Context, x: Value, dtype: Any = None) -> Result:
    return _mean_dims(ctx, x, None)


@rule("mean.dim")
def _mean_dims(ctx: Context, x: Value, dim: Dims, keepdim: bool = False, dtype: Any = None) -> Result:
    wide = ctx.cast(x, ctx.wide(ctx.out.dtype))
    return ctx.cast(_mean(ctx, wide, axes_of(dim, x.type.rank), keepdim), ctx.out.dtype)


def _variance(ctx: Context, x: Value, dim: Dims, correction: float, keepdim: bool) -> Value:
    axes = axes_of(dim, x.type.rank)
    centred = ctx.apply("sub", x, _mean(ctx, x, axes, True))
    total = ctx.reduce("sum", ctx.apply("mul", centred, centred), axes, keepdim)
    return ctx.apply("div", total, _count(x, axes) - sympy.nsimplify(correction))


@rule("var.correction")
def _var(
    ctx: Context, x: Value, dim: Dims = None, correction: float | None = None, keepdim: bool = False
) -> Result:
    wide = ctx.cast(x, ctx.wide(x.dtype))
    return ctx.cast(_variance(ctx, wide, dim, 1 if correction is None else correction, keepdim), x.dtype)


@rule("var.dim")
def _var_dim(ctx: Context, x: Value, dim: Dims, unbiased: bool = True, keepdim: bool = False) -> Result:
    return _var(ctx, x, dim, int(unbiased), keepdim)


@rule("std.correction")
def _std(
    ctx: Context, x: Value, dim: Dims = None, correction: float | None = None, keepdim: bool = False
) -> Result:
    wide = ctx.cast(x, ctx.wide(x.dtype))
    variance = _variance(ctx, wide, dim, 1 if correction is None else correction, keepdim)
    return ctx.cast(ctx.apply("sqrt", variance), x.dtype)


@rule("std.dim")
def _std_dim(ctx: Context, x: Value, dim: Dims, unbiased: bool = True, keepdim: bool = False) -> Result:
    return _std(ctx, x, dim, int(unbiased), keepdim)


@rule("amax.default")
def _amax(ctx: Context, x: Value, dim: Dims = (), keepdim: bool = False) -> Result:
    return ctx.reduce("max", x, axes_of(dim, x.type.rank), keepdim)


@rule("amin.default")
def _amin(ctx: Context, x: Value, dim: Dims = (), keepdim: bool = False) -> Result:
    return ctx.reduce("min", x, axes_of(dim, x.type.rank), keepdim)


@rule("max.default")
def _max_all(ctx: Context, x: Value) -> Result:
    return ctx.reduce("max", x, range(x.type.rank), False)


@rule("min.default")
def _min_all(ctx: Context, x: Value) -> Result:
    return ctx.reduce("min", x, range(x.type.rank), False)


@rule("any.default", "any.dim", "any.dims")
def _any(ctx: Context, x: Value, dim: Dims = None, keepdim: bool = False) -> Result:
    return ctx.reduce("any", ctx.cast(x, DType.bool), axes_of(dim, x.type.rank), keepdim)


@rule("all.default", "all.dim", "all.dims")
def _all(ctx: Context, x: Value, dim: Dims = None, keepdim: bool = False) -> Result:
    return ctx.reduce("all", ctx.cast(x, DType.bool), axes_of(dim, x.type.rank), keepdim)


@rule("prod.default")
def _prod_all(ctx: Context, x: Value, dtype: Any = None) -> Result:
    wide = ctx.cast(x, ctx.wide(ctx.out.dtype))
    return ctx.cast(ctx.reduce("prod", wide, range(x.type.rank), False), ctx.out.dtype)


@rule("prod.dim_int")
def _prod(ctx: Context, x: Value, dim: int, keepdim: bool = False, dtype: Any = None) -> Result:
    wide = ctx.cast(x, ctx.wide(ctx.out.dtype))
    return ctx.cast(ctx.reduce("prod", wide, [axis(dim, x.type.rank)], keepdim), ctx.out.dtype)


@rule("linalg_vector_norm.default")
def _vector_norm(
    ctx: Context, x: Value, ord: float = 2, dim: Dims = None, keepdim: bool = False, dtype: Any = None
) -> Result:
    """``(sum |x|^ord)^(1/ord)``, and its limits: the largest, the least, and how many are not zero."""
    axes, wide = axes_of(dim, x.type.rank), ctx.wide(ctx.out.dtype)
    size = ctx.apply("abs", ctx.cast(x, wide))
    if abs(ord) == math.inf:
        total = ctx.reduce("max" if ord > 0 else "min", size, axes, keepdim)
    elif ord == 0:
        total = ctx.reduce("sum", ctx.cast(ctx.apply("ne", size, 0), wide), axes, keepdim)
    elif ord == 1:
        total = ctx.reduce("sum", size, axes, keepdim)
    elif ord == 2:
        total = ctx.apply("sqrt", ctx.reduce("sum", ctx.apply("mul", size, size), axes, keepdim))
    else:
        total = ctx.reduce("sum", ctx.apply("pow", size, float(ord)), axes, keepdim)
        total = ctx.apply("pow", total, 1 / ord)
    return ctx.cast(total, ctx.out.dtype)


_SCANNED = 1024
"""The longest row whose running sums are taken one by one, each from the start. PyTorch runs through longer ones."""


@rule("cumsum.default")
def _cumsum(ctx: Context, x: Value, dim: int, dtype: Any = None) -> Result:
    """Element i of a row is the sum of what is at i or before it: a reduction, that no row depends on another."""
    wide = ctx.wide(ctx.out.dtype)
    x, rank = ctx.cast(x, wide), x.type.rank
    if rank == 0:
        return ctx.cast(x, ctx.out.dtype)
    at = axis(dim, rank)
    size, most = x.shape[at], ctx.most(x.shape[at])
    if most is None or most > _SCANNED:
        return None
    rows = ctx.permute(x, [*(n for n in range(rank) if n != at), at])
    square = (*rows.shape, size)
    taken = ctx.expand(ctx.unsqueeze(rows, rank - 1), square)
    before = ctx.apply("le", ctx.positions(size, square, rank), ctx.positions(size, square, rank - 1))
    sums = ctx.reduce("sum", ctx.apply("where", before, taken, ctx.const(0, wide)), [rank], False)
    order = list(range(rank - 1))
    order.insert(at, rank - 1)
    return ctx.cast(ctx.permute(sums, order), ctx.out.dtype)


# --- softmax ------------------------------------------------------------------------------------------------------


def softmax(ctx: Context, x: Value, dim: int) -> Value:
    """Softmax in the type of ``x``, shifted by the maximum so that exp cannot overflow."""
    axes = [axis(dim, x.type.rank)]
    e = ctx.apply("exp", ctx.apply("sub", x, ctx.reduce("max", x, axes, True)))
    return ctx.apply("div", e, ctx.reduce("sum", e, axes, True))


def safe_softmax(ctx: Context, x: Value, dim: int) -> Value:
    """Softmax that gives zeros where a whole row is minus infinity, as rows of masked scores may be."""
    axes = [axis(dim, x.type.rank)]
    top = ctx.apply("maximum", ctx.reduce("max", x, axes, True), torch.finfo(x.dtype.torch).min)
    e = ctx.apply("exp", ctx.apply("sub", x, top))
    total = ctx.reduce("sum", e, axes, True)
    return ctx.apply("div", e, ctx.apply("where", ctx.apply("eq", total, 0), 1, total, dtype=x.dtype))


@rule("_safe_softmax.default")
def _safe_softmax(ctx: Context, x: Value, dim: int, dtype: Any = None) -> Result:
    return ctx.cast(safe_softmax(ctx, ctx.cast(x, ctx.wide(ctx.out.dtype)), dim), ctx.out.dtype)


@rule("softmax.int", "_softmax.default")
def _softmax(ctx: Context, x: Value, dim: int, dtype: Any = None) -> Result:
    return ctx.cast(softmax(ctx, ctx.cast(x, ctx.wide(ctx.out.dtype)), dim), ctx.out.dtype)


@rule("log_softmax.int", "_log_softmax.default")
def _log_softmax(ctx: Context, x: Value, dim: int, dtype: Any = None) -> Result:
    axes = [axis(dim, x.type.rank)]
    wide = ctx.cast(x, ctx.wide(ctx.out.dtype))
    shifted = ctx.apply("sub", wide, ctx.reduce("max", wide, axes, True))
    total = ctx.apply("log", ctx.reduce("sum", ctx.apply("exp", shifted), axes, True))
    return ctx.cast(ctx.apply("sub", shifted, total), ctx.out.dtype)


@rule("logsumexp.default")
def _logsumexp(ctx: Context, x: Value, dim: Dims, keepdim: bool = False) -> Result:
    wide = ctx.cast(x, ctx.wide(ctx.out.dtype))
    return ctx.cast(log_sum_exp(ctx, wide, axes_of(dim, x.type.rank), keepdim), ctx.out.dtype)


def log_sum_exp(ctx: Context, x: Value, axes: Sequence[int], keepdim: bool) -> Value:
    """The log of the sum of exponentials in the type of ``x``, shifted by the maximum. An infinite one shifts nothing,
    as in PyTorch: infinity less itself is NaN, while exp and log give what is right by themselves."""
    top = ctx.reduce("max", x, axes, True)
    infinite = ctx.apply("eq", ctx.apply("abs", top), math.inf)
    top = ctx.apply("where", infinite, 0, top, dtype=x.dtype)
    total = ctx.reduce("sum", ctx.apply("exp", ctx.apply("sub", x, top)), axes, True)
    out = ctx.apply("add", ctx.apply("log", total), top)
    return out if keepdim else ctx.drop(out, axes)


# --- norms --------------------------------------------------------------------------------------------------------


def _scale_and_shift(ctx: Context, x: Value, weight: Value | None, bias: Value | None) -> Value:
    if weight is not None:
        x = ctx.apply("mul", x, ctx.cast(weight, x.dtype))
    if bias is not None:
        x = ctx.apply("add", x, ctx.cast(bias, x.dtype))
    return x


@rule("layer_norm.default")
def _layer_norm(
    ctx: Context,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Result:
    rank = x.type.rank
    return normalize(ctx, x, range(rank - len(normalized_shape), rank), weight, bias, eps)[0]


def normalize(
    ctx: Context, x: Value, axes: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    """Layer norm over ``axes``; also gives the mean, and the factor that makes the variance 1."""
    wide = ctx.cast(x, ctx.wide(x.dtype))
    mean = _mean(ctx, wide, axes, True)
    centred = ctx.apply("sub", wide, mean)
    variance = _mean(ctx, ctx.apply("mul", centred, centred), axes, True)
    factor = ctx.apply("rsqrt", ctx.apply("add", variance, eps))
    normal = ctx.apply("mul", centred, factor)
    return ctx.cast(_scale_and_shift(ctx, normal, weight, bias), ctx.out.dtype), mean, factor


@rule("batch_norm.default")
def _batch_norm(
    ctx: Context,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None,
    variance: Value | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Result:
    """x [B, C, ..] by the statistics of training: a factor and a summand for each channel, both known from weights."""
    if training or mean is None or variance is None:
        return None
    wide = ctx.wide(x.dtype)
    mean, variance = ctx.cast(mean, wide), ctx.cast(variance, wide)
    factor = ctx.apply("rsqrt", ctx.apply("add", variance, eps))
    if weight is not None:
        factor = ctx.apply("mul", factor, ctx.cast(weight, wide))
    summand = ctx.apply("neg", ctx.apply("mul", mean, factor))
    if bias is not None:
        summand = ctx.apply("add", summand, ctx.cast(bias, wide))
    shape = (mean.shape[0], *(1,) * (x.type.rank - 2))
    factor, summand = (ctx.reshape(v, shape) for v in (factor, summand))
    return ctx.cast(ctx.apply("add", ctx.apply("mul", ctx.cast(x, wide), factor), summand), x.dtype)


@rule("rms_norm.default")
def _rms_norm(
    ctx: Context,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    eps: float | None = None,
) -> Result:
    rank = x.type.rank
    axes = range(rank - len(normalized_shape), rank)
    wide = ctx.cast(x, ctx.wide(x.dtype))
    square = _mean(ctx, ctx.apply("mul", wide, wide), axes, True)
    epsilon = torch.finfo(wide.dtype.torch).eps if eps is None else eps
    normal = ctx.apply("mul", wide, ctx.apply("rsqrt", ctx.apply("add", square, epsilon)))
    return ctx.cast(_scale_and_shift(ctx, normal, weight, None), ctx.out.dtype)
