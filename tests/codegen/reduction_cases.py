"""Hand-built kernels with reductions: norms, softmax, reductions within others, for the list in ``triton_cases``."""

from __future__ import annotations

import torch

from tilewright.ir.builder import Builder
from tilewright.ir.types import DType, tensor_type

from .kernel_case import FLOATS, Case, case, cast, finish, layer_norm, rms_scale, view


@case("rms_norm", *((d, n) for (d,) in FLOATS for n in (33, 64)), (DType.f32, 9000))
def rms_norm(dtype: DType, width: int) -> Case:
    b = Builder()
    x = b.param_value("x", tensor_type(dtype, ["B", "S", width]))
    w = b.param_value("w", tensor_type(dtype, [width]))
    y = b.add("mul", cast(b, x, DType.f32), rms_scale(b, x))
    return finish(b, b.add("mul", cast(b, y, dtype), w), B=2, S=3)


@case("layer_norm", (DType.f32, 100), (DType.bf16, 64), (DType.f32, 9000))
def norm(dtype: DType, width: int) -> Case:
    b = Builder()
    x = b.param_value("x", tensor_type(dtype, ["B", width]))
    w, c = (b.param_value(n, tensor_type(dtype, [width])) for n in "wc")
    return finish(b, layer_norm(b, x, w, c), B=3)


@case("softmax")
def softmax() -> Case:
    """Over an axis whose length is known at run time only."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", ["B", 3, "S"]))
    top = b.add("reduce", x, kind="max", axes=(2,), keepdim=True)
    e = b.add("exp", b.add("sub", x, top))
    return finish(b, b.add("div", e, b.add("reduce", e, kind="sum", axes=(2,), keepdim=True)), B=2, S=29)


@case("reduce", ("sum",), ("max",), ("min",), ("prod",))
def reduce(kind: str) -> Case:
    """Over two axes that are not neighbours."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", ["B", 5, 6, 7]))
    return finish(b, b.add("reduce", x, kind=kind, axes=(1, 3), keepdim=False), B=2)


@case("lost", *((kind, dtype, n) for kind, dtype in (("max", "f32"), ("min", "f64")) for n in (40, 9000)))
def lost(kind: str, dtype: str, width: int) -> Case:
    """NaN among numbers, along rows and across them: the result is NaN, wherever in a row it stands."""
    b = Builder()
    x = b.param_value("x", tensor_type(dtype, ["B", width]))
    rows, columns = (b.add("reduce", x, kind=kind, axes=(axis,), keepdim=False) for axis in (1, 0))
    both = b.add("reduce", b.add("abs", x), kind=kind, axes=(0, 1), keepdim=False)
    made = finish(b, rows, columns, both, B=5)
    given = torch.randn(5, width, generator=torch.Generator().manual_seed(1), dtype=DType(dtype).torch)
    for row, place in ((0, 0), (1, 17), (2, width - 1)):
        given[row, place] = torch.nan
    return Case(made.module, made.dims, {"x": given})


@case("predicate", ("any",), ("all",))
def predicate(kind: str) -> Case:
    b = Builder()
    x = b.param_value("x", tensor_type("f32", ["B", 5]))
    return finish(
        b, b.add("reduce", b.add("gt", x, b.const(0.0, DType.f32)), kind=kind, axes=(1,), keepdim=False), B=4
    )


@case("integer_sum")
def integer_sum() -> Case:
    b = Builder()
    x = b.param_value("x", tensor_type("i64", ["B", "S"]))
    made = finish(
        b,
        b.add("reduce", x, kind="sum", axes=(1,), keepdim=True),
        b.add("reduce", x, kind="max", axes=(1,), keepdim=True),
        B=2,
        S=5,
    )
    return Case(made.module, made.dims, {"x": torch.arange(-3, 7).reshape(2, 5)})


@case("pool")
def pool() -> Case:
    """A mean over positions, then L2 normalisation: a reduction inside the body of another, over another axis."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", ["B", "S", 16]))
    total = b.add("reduce", x, kind="sum", axes=(1,), keepdim=False)
    norm = b.add("reduce", b.add("mul", total, total), kind="sum", axes=(1,), keepdim=True)
    return finish(b, b.add("mul", total, b.add("rsqrt", norm)), B=2, S=7)


@case("merge")
def merge() -> Case:
    """Partial attention results of several chunks merged into one."""
    b = Builder()
    acc = b.param_value("acc", tensor_type("f32", ["B", 4, 1, 8, 16]))
    top, total = (b.param_value(n, tensor_type("f32", ["B", 4, 1, 8])) for n in ("top", "total"))
    highest = b.add("reduce", top, kind="max", axes=(3,), keepdim=True)
    weight = b.add("exp", b.add("sub", top, highest))
    norm = b.add("reduce", b.add("mul", weight, total), kind="sum", axes=(3,), keepdim=True)
    scaled = b.add("mul", acc, view(b, weight, ["B", 4, 1, 8, 16], "i0", "i1", "i2", "i3"))
    summed = b.add("reduce", scaled, kind="sum", axes=(3,), keepdim=False)
    made = finish(b, b.add("div", summed, norm), B=2)
    return Case(made.module, made.dims, {"total": torch.rand(2, 4, 1, 8) + 0.5})


@case("one_row")
def one_row() -> Case:
    """Reductions to a single number, stored as such and with the row it normalises."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", [1, 1, 50]))
    scale = rms_scale(b, x)
    return finish(b, view(b, scale, [], "0", "0", "0"), b.add("mul", x, scale))
