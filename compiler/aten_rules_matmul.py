"""Matrix products and experts. The IR's ``matmul`` has K last on both sides, as ``linear`` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sympy import Expr, prod

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


@rule("einsum.default")
def _einsum(ctx: Context, equation: str, tensors: Sequence[Value], path: Any = None) -> Result:
    """Of two tensors, each of whose dims has a letter of its own: those that both have and the result lacks are
    multiplied out, after each tensor's own ones that the result lacks are summed."""
    inputs, _, kept = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if "->" not in equation or "." in equation or len(letters) != 2 or not tensors[0].dtype.is_float:
        return None
    sizes: dict[str, Expr] = {}
    for named, x in zip(letters, tensors, strict=True):
        same = all(sizes.setdefault(name, d) == d for name, d in zip(named, x.shape, strict=True))
        if not same or len(set(named)) != len(named):
            return None
    (a, names_a), (b, names_b) = (
        _summed(ctx, x, mine, kept + other)
        for x, mine, other in zip(tensors, letters, reversed(letters), strict=True)
    )
    batch = [n for n in names_a if n in names_b and n in kept]
    depth = [n for n in names_a if n in names_b and n not in kept]
    rows, columns = ([n for n in names if n not in (*batch, *depth)] for names in (names_a, names_b))

    def matrices(x: Value, names: str, across: list[str]) -> Value:
        x = ctx.permute(x, [names.index(n) for n in (*batch, *across, *depth)])
        return ctx.reshape(
            x, [sizes[n] for n in batch] + [prod(sizes[n] for n in part) for part in (across, depth)]
        )

    product = matrix_product(ctx, matrices(a, names_a, rows), matrices(b, names_b, columns))
    order = [*batch, *rows, *columns]
    return ctx.permute(ctx.reshape(product, [sizes[n] for n in order]), [order.index(n) for n in kept])


def _summed(ctx: Context, x: Value, names: str, needed: str) -> tuple[Value, str]:
    """A tensor without the dims that nothing else has, and the letters of the others."""
    alone = [n for n, name in enumerate(names) if name not in needed]
    if alone:
        x = ctx.cast(ctx.reduce("sum", ctx.cast(x, ctx.wide(x.dtype)), alone, False), x.dtype)
    return x, "".join(n for n in names if n in needed)


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
