"""Convolutions and pools. Where windows lie apart, a convolution is a product of patches; where each channel has a
filter of its own, a sum over views of its windows. PyTorch runs the others, for which it has a vendor's library."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from sympy import Expr, Integer

from tilewright.ir.index import index_symbols
from tilewright.ir.types import Value

from .aten_rules import Context, Result, rule
from .aten_rules_matmul import matrix_product
from .aten_rules_view import padded

Sizes = tuple[Expr, ...]


@rule(
    "conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding", "conv3d.padding"
)
def _convolution(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Result:
    """x[B, C, *sizes], weight[O, C / groups, *kernel] -> [B, O, *counts]; not of an input without a batch."""
    kernel = weight.shape[2:]
    dims = len(kernel)
    if x.type.rank != dims + 2 or not x.dtype.is_float:
        return None
    steps, apart = _per_dim(stride, dims), _per_dim(dilation, dims)
    pads = _pads(padding, kernel, apart)
    close = all(d == 1 for d in apart)
    if groups == 1 and close and steps == kernel and all(low == high == 0 for low, high in pads):
        return _product_of_patches(ctx, x, weight, bias)
    if x.shape[1] == groups == weight.shape[0]:
        return _each_channel(ctx, x, weight, bias, steps, pads, apart)
    return None


def _product_of_patches(ctx: Context, x: Value, weight: Value, bias: Value | None) -> Value:
    """A kernel that steps by its own size: every element belongs to one patch at most, and the convolution is a product
    of patches, [B, *counts, C * kernel], with the weight's rows."""
    counts, kernel = ctx.out.shape[2:], weight.shape[2:]
    for n, (count, size) in enumerate(zip(counts, kernel, strict=True)):
        x = ctx.narrow(x, 2 + n, 0, sympy.expand(count * size))  # what fills no patch is left out
    split = [d for pair in zip(counts, kernel, strict=True) for d in pair]
    x = ctx.reshape(x, (*x.shape[:2], *split))
    # [B, C, count, size, ...] -> [B, count, ..., C, size, ...]
    x = ctx.permute(x, (0, *range(2, x.type.rank, 2), 1, *range(3, x.type.rank, 2)))
    depth = sympy.prod(weight.shape[1:])
    patches = ctx.reshape(x, (x.shape[0], sympy.prod(counts), depth))
    product = matrix_product(ctx, patches, ctx.reshape(weight, (weight.shape[0], depth)))
    product = product if bias is None else ctx.apply("add", product, bias)
    return ctx.reshape(ctx.transposed(product), ctx.out.shape)


def _each_channel(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None,
    steps: Sizes,
    pads: Sequence[tuple[Expr, Expr]],
    apart: Sizes,
) -> Value:
    """One filter for each channel: windows times filters, summed in float32 for half types. Channels come last in all
    of them, so that loops run along memory."""
    kernel = weight.shape[2:]
    dims, wide = len(kernel), ctx.wide(x.dtype)
    x = ctx.permute(x, (0, *range(2, 2 + dims), 1))
    for n, (low, high) in enumerate(pads):
        x = padded(ctx, x, 1 + n, low, high, 0)
    windows = _windows(ctx, x, ctx.out.shape[2:], kernel, steps, apart)
    filters = ctx.reshape(ctx.cast(weight, wide), (weight.shape[0], *kernel))
    filters = ctx.permute(filters, (*range(1, 1 + dims), 0))
    terms = ctx.apply("mul", ctx.cast(windows, wide), filters)
    total = ctx.reduce("sum", terms, range(1 + dims, 1 + 2 * dims), False)
    if bias is not None:
        total = ctx.apply("add", total, ctx.cast(bias, wide))
    return ctx.permute(ctx.cast(total, x.dtype), (0, 1 + dims, *range(1, 1 + dims)))


def _windows(ctx: Context, x: Value, counts: Sizes, kernel: Sizes, steps: Sizes, apart: Sizes) -> Value:
    """[B, *sizes, C] -> [B, *counts, *kernel, C]: the elements under a kernel at each of its places."""
    dims = len(kernel)
    b, *rest, c = index_symbols(2 + 2 * dims)
    places = [
        step * i + gap * k for i, k, step, gap in zip(rest[:dims], rest[dims:], steps, apart, strict=True)
    ]
    return ctx.view(x, (x.shape[0], *counts, *kernel, x.shape[-1]), (b, *places, c))


def _per_dim(sizes: int | Sequence[int], dims: int) -> Sizes:
    """A convolution's argument as one number per dim: a lone number counts for all of them."""
    given = [sizes] if isinstance(sizes, int) else list(sizes)
    return tuple(map(Integer, given * dims if len(given) == 1 else given))


def _pads(padding: int | Sequence[int] | str, kernel: Sizes, apart: Sizes) -> list[tuple[Expr, Expr]]:
    """Zeros before and after each dim. ``same``: as many as leave the size, the odd one after."""
    if padding == "same":
        whole = [gap * (size - 1) for size, gap in zip(kernel, apart, strict=True)]
        return [(Integer(int(n) // 2), n - Integer(int(n) // 2)) for n in whole]
    amounts = _per_dim(0 if isinstance(padding, str) else padding, len(kernel))
    return [(n, n) for n in amounts]


# --- pools --------------------------------------------------------------------------------------------------------


@rule("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default")
def _mean_of_all(ctx: Context, x: Value, sizes: int | Sequence[int]) -> Result:
    """A pool to one element, which is a mean; to more of them, windows may be of different sizes."""
    dims = 1 if isinstance(sizes, int) else len(sizes)
    if any(d != 1 for d in ctx.out.shape[-dims:]):
        return None
    axes = range(x.type.rank - dims, x.type.rank)
    wide = ctx.cast(x, ctx.wide(x.dtype))
    total, count = ctx.reduce("sum", wide, axes, True), sympy.prod(x.shape[-dims:])
    return ctx.cast(ctx.apply("div", total, count), x.dtype)


@rule("avg_pool1d.default", "avg_pool2d.default")
def _mean_of_windows(
    ctx: Context,
    x: Value,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = (),
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Result:
    """Of whole windows without padding."""
    dims = 1 if isinstance(kernel, int) else len(kernel)
    sizes = _per_dim(kernel, dims)
    steps = _per_dim(stride, dims) if stride else sizes
    if x.type.rank != dims + 2 or any(_per_dim(padding, dims)) or ceil_mode:
        return None
    last = ctx.permute(ctx.cast(x, ctx.wide(x.dtype)), (0, *range(2, 2 + dims), 1))
    windows = _windows(ctx, last, ctx.out.shape[2:], sizes, steps, (Integer(1),) * dims)
    total = ctx.reduce("sum", windows, range(1 + dims, 1 + 2 * dims), False)
    mean = ctx.cast(ctx.apply("div", total, divisor_override or sympy.prod(sizes)), x.dtype)
    return ctx.permute(mean, (0, 1 + dims, *range(1, 1 + dims)))
