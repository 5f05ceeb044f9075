"""Hand-built kernels around matrix products, with prologues and epilogues, for the list in ``triton_cases``."""

from __future__ import annotations

import torch

from tilewright.ir.builder import Builder
from tilewright.ir.module import Module
from tilewright.ir.types import DType, Value, tensor_type

from .kernel_case import ROWS, Case, case, cast, centred, finish, layer_norm, rms_scale, rows_type, view


@case("linear", *ROWS, (DType.f64, "many"))
def linear(dtype: DType, rows: str) -> Case:
    """Bias, GELU and a residual in the epilogue; an odd K and N, so that every tail is masked."""
    return biased(dtype, rows, 70)


def biased(dtype: DType, rows: str, k: int, n: int = 90, **dims: int) -> Case:
    b = Builder()
    x = b.param_value("x", rows_type(dtype, rows, k))
    w, c = b.param_value("w", tensor_type(dtype, [n, k])), b.param_value("c", tensor_type(dtype, [n]))
    y = b.add("add", b.add("matmul", x, w), c)
    half = b.add("mul", y, b.const(0.5, dtype))
    gelu = b.add(
        "mul",
        half,
        b.add("add", b.add("erf", b.add("mul", y, b.const(0.7071067811865476, dtype))), b.const(1.0, dtype)),
    )
    return finish(b, b.add("add", gelu, b.param_value("residual", y.type)), **{"B": 2, "S": 19, **dims})


@case("even_linear", (DType.bf16, "many"), (DType.bf16, "four"))
def even_linear(dtype: DType, rows: str) -> Case:
    """The same with K a multiple of everything, where nothing is masked: five tiles of a matrix unit."""
    return biased(dtype, rows, 160)


@case("wide_linear", (DType.f32, "many"), (DType.bf16, "many"))
def wide_linear(dtype: DType, rows: str) -> Case:
    """More columns than the panels that a thread of a CPU packs at once."""
    return biased(dtype, rows, 40, n=600)


@case("between_others", *ROWS)
def between_others(dtype: DType, rows: str) -> Case:
    """Weights in rows that go on with what is no number: whatever reads beyond its 70 columns shows."""
    b = Builder()
    x, wide = (
        b.param_value("x", rows_type(dtype, rows, 70)),
        b.param_value("w", tensor_type(dtype, [96, 104])),
    )
    made = finish(b, b.add("matmul", x, view(b, wide, [96, 70], "i0", "i1")), B=2, S=19)
    weights = torch.randn(96, 104, generator=torch.Generator().manual_seed(9)).to(dtype.torch)
    weights[:, 70:] = torch.nan
    return Case(made.module, made.dims, {"w": weights})


@case("parts", *ROWS)
def parts(dtype: DType, rows: str) -> Case:
    """A product in two parts along K, each stored in float32."""
    return in_parts(dtype, rows, 70)


def in_parts(dtype: DType, rows: str, k: int) -> Case:
    b = Builder()
    x = b.param_value("x", rows_type(dtype, rows, k))
    return Case(*parts_product(b, x, b.param_value("w", tensor_type(dtype, [90, k]))))


def parts_product(b: Builder, x: Value, w: Value) -> tuple[Module, dict[str, int]]:
    """What ``split_products`` makes of a product, before the sum."""
    lead, (columns, k) = x.shape[:-1], w.shape
    half = int(k) // 2
    left = view(b, x, [2, *lead, half], "i1", "i2", f"{half} * i0 + i3")
    right = view(b, w, [2, lead[0], columns, half], "i2", f"{half} * i0 + i3")
    made = finish(b, b.add("matmul", left, right, wide=1), B=2, S=19)
    return made.module, made.dims


@case("classifier", (DType.f32, "many"), (DType.bf16, "one"))
def classifier(dtype: DType, rows: str) -> Case:
    """A product with a single column."""
    b = Builder()
    x, w = b.param_value("x", rows_type(dtype, rows, 70)), b.param_value("w", tensor_type(dtype, [1, 70]))
    return finish(
        b, b.add("add", b.add("matmul", x, w), b.param_value("c", tensor_type(dtype, [1]))), B=2, S=19
    )


@case("norm_linear", *ROWS)
def norm_linear(dtype: DType, rows: str) -> Case:
    """LayerNorm as a prologue: two reductions, one after the other, before the product."""
    b = Builder()
    x = b.param_value("x", rows_type(dtype, rows, 70))
    g, c = (b.param_value(n, tensor_type(dtype, [70])) for n in "gc")
    w = b.param_value("w", tensor_type(dtype, [33, 70]))
    return finish(b, b.add("matmul", layer_norm(b, x, g, c), w), B=2, S=19)


@case("gated", *ROWS)
def gated(dtype: DType, rows: str) -> Case:
    """RMSNorm whose row scale was commuted past the product; silu(gate) * up from one merged matrix."""
    return gated_product(dtype, rows, 70)


def gated_product(dtype: DType, rows: str, k: int) -> Case:
    b = Builder()
    x = b.param_value("x", rows_type(dtype, rows, k))
    g, w = b.param_value("g", tensor_type(dtype, [k])), b.param_value("w", tensor_type(dtype, [96, k]))
    y = b.add("mul", cast(b, b.add("matmul", b.add("mul", x, g), w), DType.f32), rms_scale(b, x))
    lead = [*x.shape[:-1], 48]
    gate, up = (view(b, y, lead, "i0", "i1", f"i2 + {n}") for n in (0, 48))
    silu = b.add("mul", gate, b.add("sigmoid", gate))
    return finish(b, cast(b, b.add("mul", silu, up), dtype), B=2, S=19)


@case("norm_behind", (DType.bf16, "many"), (DType.f32, "four"))
def norm_behind(dtype: DType, rows: str) -> Case:
    """A LayerNorm without bias, whose scale has moved behind the product: its epilogue needs the variance."""
    b = Builder()
    x = b.param_value("x", rows_type(dtype, rows, 64))
    g, w = b.param_value("g", tensor_type(dtype, [64])), b.param_value("w", tensor_type(dtype, [48, 64]))
    distance, scale = centred(b, x)
    row = cast(b, b.add("mul", distance, cast(b, g, DType.f32)), dtype)
    y = b.add("mul", cast(b, b.add("matmul", row, w), DType.f32), scale)
    return finish(b, cast(b, y, dtype), B=2, S=19)


@case("rope", *ROWS)
def rope(dtype: DType, rows: str) -> Case:
    """QKV from one matrix, RoPE on q and k, and the append of k and v: three segments, two dots in two of them."""
    return rotary(dtype, rows, 8)


def rotary(dtype: DType, rows: str, size: int) -> Case:
    b = Builder()
    x = b.param_value("x", rows_type(dtype, rows, 32))
    batch, tokens = x.shape[:2]
    w = b.param_value("w", tensor_type(dtype, [(4 + 2 + 2) * size, 32]))
    cos, sin = (b.param_value(n, tensor_type(dtype, [batch, tokens, size])) for n in ("cos", "sin"))
    y = cast(b, b.add("mul", cast(b, b.add("matmul", x, w), DType.f32), rms_scale(b, x)), dtype)
    outs = []
    for start, heads in ((0, 4), (4, 2), (6, 2)):
        z = view(
            b,
            view(b, y, [batch, tokens, heads * size], "i0", "i1", f"i2 + {start * size}"),
            [batch, heads, tokens, size],
            "i0",
            "i2",
            f"{size}*i1 + i3",
        )
        if start < 6:
            half = [batch, heads, tokens, size // 2]
            low, high = (view(b, z, half, "i0", "i1", "i2", e) for e in ("i3", f"i3 + {size // 2}"))
            turned = b.add("concat", b.add("neg", high), low, axis=3)
            c, s = (view(b, t, [batch, 1, tokens, size], "i0", "i2", "i3") for t in (cos, sin))
            z = b.add("add", b.add("mul", z, c), b.add("mul", turned, s))
        outs.append(b.add("append", z, slot="kv"[start // 6]) if start else z)
    sizes = {
        "many": {"B": 2, "S": 19, "T": 25},
        "one": {"B": 1, "S": 1, "T": 9},
        "four": {"B": 4, "S": 1, "T": 9},
    }
    return finish(b, *outs, **sizes[rows])


@case("batched", (DType.f32,), (DType.bf16,))
def batched(dtype: DType) -> Case:
    """A product of two batched operands: the batch is spread over the programs."""
    b = Builder()
    x = b.param_value("x", tensor_type(dtype, ["B", 3, "S", 16]))
    y = b.param_value("y", tensor_type(dtype, ["B", 3, 10, 16]))
    return finish(b, b.add("matmul", x, y), B=2, S=5)


@case("batched_heads", (DType.f32, 32), (DType.bf16, 32), (DType.bf16, 20))
def batched_heads(dtype: DType, size: int) -> Case:
    """Heads of two operands, of which one is the same for all requests, with the result seen as one axis: its digits
    are the products of the batch, their rows and their columns. Rows lie apart, in runs of whole vectors or not."""
    b = Builder()
    x = b.param_value("x", tensor_type(dtype, ["B", "S", 4 * size]))
    table = b.param_value("table", tensor_type(dtype, [40, 4 * size]))
    bias = b.param_value("bias", tensor_type(dtype, [40]))
    heads = view(b, x, ["4*B", "S", size], "i0 // 4", "i1", f"i2 + {size}*(i0 % 4)")
    keys = view(b, table, ["4*B", 40, size], "i1", f"i2 + {size}*(i0 % 4)")
    scores = b.add("add", b.add("matmul", heads, keys), bias)
    return finish(b, view(b, scores, ["160*B*S"], "i0 // (40*S)", "(i0 // 40) % S", "i0 % 40"), B=2, S=19)


@case("batched_values", (DType.f32, False), (DType.bf16, False), (DType.bf16, True))
def batched_values(dtype: DType, widened: bool) -> Case:
    """Weights times values, which lie with their depth apart, and may be multiplied in a wider type; the epilogue
    reduces the weights, row by row."""
    b = Builder()
    p = b.param_value("p", tensor_type(dtype, ["B", 3, "S", "T"]))
    v = b.param_value("v", tensor_type(dtype, ["B", 3, "T", 20]))
    wide = cast(b, p, DType.f32)
    total = b.add("reduce", b.add("abs", wide), kind="sum", axes=(3,), keepdim=True)
    values = view(b, v, ["B", 3, 20, "T"], "i0", "i1", "i3", "i2")
    made = b.add("matmul", wide, cast(b, values, DType.f32)) if widened else b.add("matmul", p, values)
    return finish(b, b.add("div", cast(b, made, DType.f32), total), B=2, S=19, T=45)


@case("nested")
def nested() -> Case:
    """A product of a product: reductions that depend on each other's axis."""
    b = Builder()
    x, w, v = (b.param_value(n, tensor_type("f32", [6, 6])) for n in "xwv")
    return finish(b, b.add("matmul", b.add("tanh", b.add("matmul", x, w)), v))
