"""Hand-built kernels that read and write f8, for the list in ``triton_cases``."""

from __future__ import annotations

import torch

from tilewright.ir.builder import Builder
from tilewright.ir.types import DType, tensor_type

from .attention_cases import attend
from .kernel_case import Case, case, cast, finish, rms_scale, rows_type, view

# Every code, and what lies at, between and around the numbers that f8 has.
CODES = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
NEAR = torch.cat(
    [
        CODES.float()[torch.isfinite(CODES.float())],
        torch.logspace(-5, 3, 400),
        -torch.logspace(-5, 3, 400),
        torch.arange(-17, 18) * 2.0**-10,  # subnormal numbers and the ties between them
        torch.tensor([447.9, 463.9, 464.0, 480.0, 1e9, -1e30, 1e-40, float("nan")]),
    ]
)


@case("f8_read")
def f8_read() -> Case:
    """Every code as a float, -1 for NaN."""
    b = Builder()
    x = cast(b, b.param_value("x", tensor_type("f8", [256])), DType.f32)
    made = finish(b, b.add("where", b.add("eq", x, x), x, b.const(-1.0, DType.f32)))
    return Case(made.module, made.dims, {"x": CODES})


@case("f8_write")
def f8_write() -> Case:
    """Ties go to the even code, what is too large becomes 448, NaN stays NaN."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", [len(NEAR)]))
    made = finish(b, cast(b, x, DType.f8))
    return Case(made.module, made.dims, {"x": NEAR})


@case("f8_weights", *((d, r) for d in (DType.f32, DType.bf16) for r in ("one", "four", "many")))
def f8_weights(dtype: DType, rows: str) -> Case:
    """A row's norm before the product, a scale per column and a residual after it."""
    b = Builder()
    x = b.param_value("x", rows_type(dtype, rows, 96))
    w, scale = (
        b.param_value("w", tensor_type("f8", [80, 96])),
        b.param_value("scale", tensor_type("f32", [80, 1])),
    )
    normal = cast(b, b.add("mul", cast(b, x, DType.f32), rms_scale(b, x)), dtype)
    y = cast(b, b.add("matmul", normal, cast(b, w, dtype), wide=1), DType.f32)
    y = cast(b, b.add("mul", y, view(b, scale, [80], "i0", "0")), dtype)
    return finish(b, b.add("add", y, b.param_value("residual", y.type)), B=2, S=19)


@case("f8_table")
def f8_table() -> Case:
    """Rows of a stored matrix, looked up."""
    b = Builder()
    ids = b.param_value("ids", tensor_type("i64", ["B"]))
    table, scale = (
        b.param_value("table", tensor_type("f8", [20, 24])),
        b.param_value("scale", tensor_type("f32", [20, 1])),
    )
    matrix = b.add("mul", cast(b, table, DType.f32), scale)
    made = finish(b, b.add("gather", matrix, ids, axis=0), B=3)
    return Case(made.module, made.dims, {"ids": torch.tensor([3, 19, 0])})


@case("f8_append")
def f8_append() -> Case:
    """New keys of each position, rounded as they are appended."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", ["B", "S", 32]))
    k = view(b, b.add("mul", x, b.const(3.0, DType.f32)), ["B", 2, "S", 16], "i0", "i2", "16*i1 + i3")
    return finish(b, b.add("append", cast(b, k, DType.f8), slot="k"), B=2, S=3, T=9)


NARROW = ((DType.f32, DType.bf16), (DType.f32, DType.f16), (DType.f32, DType.f8), (DType.bf16, DType.f8))


@case("narrow_cache", *((*pair, q) for pair in NARROW for q in ("S", 1)))
def narrow_cache(dtype: DType, stored: DType, queries: object) -> Case:
    """Keys and values in a narrower type than queries."""
    return attend("attention", dtype, 16, slot="", extras=("mask",), queries=queries, stored=stored)


@case("narrow_cache_split", *NARROW)
def narrow_cache_split(dtype: DType, stored: DType) -> Case:
    return attend("attention_split", dtype, 16, queries=1, splits=4, extras=("mask",), stored=stored)
