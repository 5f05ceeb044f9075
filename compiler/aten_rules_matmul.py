"""Matrix products and experts. The IR's ``matmul`` has K last on both sides, as ``linear`` does."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from sympy import Expr

from tilewright.ir.experts import Gate
from tilewright.ir.ops import broadcast
from tilewright.ir.types import Value

from .aten_rules import Context, Number, Result, rule


def matrix_product(ctx: Context, a: Value, b: Value) -> Value:
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
    return _plus(ctx, matrix_product(ctx, x, weight), bias)


def _product(ctx: Context, a: Value, b: Value) -> Value:
    """``torch.matmul``: vectors are rows on the left and columns on the right."""
    left = ctx.unsqueeze(a, 0) if a.type.rank == 1 else a
    right = ctx.unsqueeze(b, 0) if b.type.rank == 1 else ctx.transposed(b)
    out = matrix_product(ctx, left, right)
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
    product = _plus(ctx, matrix_product(ctx, patches, ctx.reshape(weight, (weight.shape[0], depth))), bias)
    return ctx.reshape(ctx.transposed(product), ctx.out.shape)


def _per_dim(sizes: int | Sequence[int], dims: int) -> tuple[Expr, ...]:
    """A convolution's argument as one number per dim: a lone number counts for all of them."""
    given = [sizes] if isinstance(sizes, int) else list(sizes)
    return tuple(map(sympy.Integer, given * dims if len(given) == 1 else given))


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
