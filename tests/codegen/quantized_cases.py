"""Hand-built kernels whose weights are codes, for the list in ``triton_cases``.

Layouts: ``rows`` as the Triton backend stores them, ``blocks`` with sixteen rows interleaved as C++ reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.ir.builder import Builder
from tilewright.ir.index import IndexMap, parse_expr
from tilewright.ir.quantization import quantize
from tilewright.ir.types import DType, TensorType, Value, tensor_type

from .kernel_case import Case, case, cast, finish, rms_scale, rows_type, view
from .product_cases import parts_product

GROUP = 32
KINDS = {"int8": (8, 0), "int8_groups": (8, GROUP), "int4": (4, GROUP)}
"""Bits, and columns that share a scale (0: all of a row)."""


def stored(
    b: Builder, name: str, shape: tuple[int, int], kind: str, layout: str, dtype: DType = DType.f32
) -> tuple[Value, dict[str, Tensor]]:
    """A quantised matrix [N, K] in the given layout, read as ``dtype``, and tensors for the parameters that hold it."""
    n, k = shape
    bits, group = KINDS[kind]
    group = group or k
    matrix = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.3
    parts = dict(zip(("codes", "scale", "minimum"), quantize(matrix, bits, group), strict=False))
    values, tensors = [], {}
    for what, tensor in parts.items():
        full = f"{name}_{what}"
        columns = tensor.shape[1]
        if layout == "rows":
            tensors[full] = tensor
            values.append(
                b.param_value(full, TensorType(DType.from_torch(tensor.dtype), matrix_type(tensor)))
            )
            continue
        run = 4 if what == "codes" else 1
        blocked = tensor.view(n // 16, 16, columns // run, run).transpose(1, 2).contiguous()
        blocked = blocked if what == "codes" else blocked.squeeze(-1)
        tensors[full] = blocked
        value = b.param_value(full, TensorType(DType.from_torch(tensor.dtype), matrix_type(blocked)))
        where = (
            ("i0 // 16", "i1 // 4", "i0 % 16", "i1 % 4") if what == "codes" else ("i0 // 16", "i1", "i0 % 16")
        )
        if what != "codes" and columns == 1:
            where = ("i0 // 16", "0", "i0 % 16")
        index_map = IndexMap(2, tuple(map(parse_expr, where)))
        type = TensorType(value.dtype, matrix_type(tensor))
        values.append(b.add("view", value, type=type, map=index_map))
    return b.add("dequantize", *values, type=tensor_type(dtype, shape), bits=bits, group=group), tensors


def matrix_type(tensor: Tensor) -> tuple[object, ...]:
    return tensor_type("f32", tuple(tensor.shape)).shape


FORMS = tuple((kind, layout) for kind in KINDS for layout in ("rows", "blocks"))


@case(
    "quantized",
    *((*form, rows) for form in FORMS for rows in ("one", "four", "many")),
    ("int4", "blocks", "one", 32),
)
def quantized(kind: str, layout: str, rows: str, group: int = 0) -> Case:
    """A residual after the product and a row's norm before it; weights become floats where they are read."""
    b = Builder()
    x = b.param_value("x", rows_type(DType.f32, rows, 96))
    w, given = stored(b, "w", (80, 96), kind, layout)
    normal = b.add("mul", x, rms_scale(b, x))
    y = b.add("matmul", normal, w, activation_group=group or None)
    made = finish(b, b.add("add", y, b.param_value("residual", y.type)), B=2, S=19)
    return Case(made.module, made.dims, given)


@case(
    "quantized_gated",
    *((kind, dtype, "one", 32) for kind in KINDS for dtype in (DType.f32, DType.f16, DType.bf16)),
    *((kind, DType.bf16, rows) for kind in KINDS for rows in ("one", "four")),
)
def quantized_gated(kind: str, dtype: DType, rows: str, group: int = 0) -> Case:
    """RMSNorm whose row scale was commuted past the product, silu(gate) * up: a sum over the row beside two dots, from
    elements that are a product themselves. The row may be rounded, or not."""
    b = Builder()
    x = b.param_value("x", rows_type(dtype, rows, 96))
    g = b.param_value("g", tensor_type(dtype, [96]))
    w, given = stored(b, "w", (88, 96), kind, "rows", dtype)
    product = b.add("matmul", b.add("mul", x, g), w, activation_group=group or None)
    y = b.add("mul", cast(b, product, DType.f32), rms_scale(b, x))
    gate, up = (view(b, y, [*x.shape[:-1], 44], "i0", "i1", f"i2 + {n}") for n in (0, 44))
    made = finish(b, cast(b, b.add("mul", b.add("mul", gate, b.add("sigmoid", gate)), up), dtype))
    return Case(made.module, made.dims, given)


@case("quantized_prompt", *((kind,) for kind in KINDS))
def quantized_prompt(kind: str) -> Case:
    """Many rows of bf16: codes in blocks become bf16 there, not floats. A gate beside its up-projection."""
    b = Builder()
    x = b.param_value("x", rows_type(DType.bf16, "many", 96))
    w, given = stored(b, "w", (96, 96), kind, "blocks", DType.bf16)
    y = b.add("matmul", x, w)
    gate, up = (view(b, y, [*x.shape[:-1], 48], "i0", "i1", f"i2 + {n}") for n in (0, 48))
    made = finish(b, b.add("mul", b.add("mul", gate, b.add("sigmoid", gate)), up), B=2, S=19)
    return Case(made.module, made.dims, given)


@case("rounded", *((kind, rows) for kind in KINDS for rows in (1, 3, 8, 16)))
def rounded(kind: str, rows: int) -> Case:
    """Activations in int8: a gate beside its up-projection, so two dot products per column."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", [rows, 1, 64]))
    w, given = stored(b, "w", (96, 64), kind, "blocks")
    y = b.add("matmul", x, w, activation_group=32)
    gate, up = (view(b, y, [rows, 1, 48], "i0", "i1", f"i2 + {start}") for start in (0, 48))
    made = finish(b, b.add("mul", b.add("mul", gate, b.add("sigmoid", gate)), up))
    return Case(made.module, made.dims, given)


@case("rounded_nan", *((kind, rows) for kind in KINDS for rows in (1, 3)))
def rounded_nan(kind: str, rows: int) -> Case:
    """A row with one element that is no number has results that are none, whatever is left of it when it is rounded."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", [rows, 1, 64]))
    w, given = stored(b, "w", (96, 64), kind, "blocks")
    made = finish(b, b.add("matmul", x, w, activation_group=32))
    row = torch.randn(rows, 1, 64, generator=torch.Generator().manual_seed(3))
    row[0, 0, 5] = torch.nan
    return Case(made.module, made.dims, {**given, "x": row})


@case(
    "stored_rows",
    *((kind, rows, dtype) for kind in KINDS for rows, dtype in ((2, "bf16"), (3, "f32"), (8, "bf16"))),
    *(("int8", rows, dtype, k) for rows, dtype, k in ((5, "f32", 256), (20, "bf16", 256), (40, "f16", 512))),
)
def stored_rows(kind: str, rows: int, dtype: str, k: int = 96) -> Case:
    """Integers on both sides: rows that were rounded before, a gate beside its up-projection, a factor of each row."""
    b = Builder()
    w, given = stored(b, "w", (44, k), kind, "rows", DType(dtype))
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
    parts = dict(zip(("x_codes", "x_scale"), quantize(x, 8, GROUP), strict=True))
    values = [
        b.param_value(name, TensorType(DType.from_torch(tensor.dtype), matrix_type(tensor)))
        for name, tensor in parts.items()
    ]
    type = tensor_type(dtype, (rows, k))
    a = view(b, b.add("dequantize", *values, type=type, bits=8, group=GROUP), [rows, 1, k], "i0", "i2")
    y = b.add("mul", b.add("matmul", a, w), b.param_value("factor", tensor_type(dtype, [rows, 1, 1])))
    gate, up = (view(b, y, [rows, 1, 22], "i0", "i1", f"i2 + {start}") for start in (0, 22))
    made = finish(b, b.add("mul", b.add("mul", gate, b.add("sigmoid", gate)), up))
    return Case(made.module, made.dims, given | parts)


@case("round_rows", *((rows, dtype) for rows in (1, 3) for dtype in ("f32", "bf16")), (3, "f32", "nan"))
@case("round_shared", (3, "f32", "", 256), (5, "f32", "", 1024))
def round_rows(rows: int, dtype: str, strange: str = "", size: int = 96) -> Case:
    """Codes of rows and the scales of their groups, one of which may hold no number; in f32 of normalised rows (a
    kernel may keep those of bf16 in f32, which makes other codes), whose groups share a sum of squares."""
    b = Builder()
    x = b.param_value("x", tensor_type(dtype, [rows, size]))
    normal = b.add("mul", x, rms_scale(b, x)) if dtype == "f32" and not strange else x
    codes, scale = b.add_multi("quantize", normal, bits=8, group=GROUP)
    values = torch.randn(rows, size, generator=torch.Generator().manual_seed(2))
    values[0, :32] = 0.0
    if strange:
        values[1, 70] = torch.nan
    # (What codes are where there is no number, no two processors agree on.)
    made = finish(b, *(() if strange else (codes,)), scale)
    return Case(made.module, made.dims, {"x": values.to(DType(dtype).torch)})


@case("rounded_halves", *((kind, half) for kind in KINDS for half in (16, 8)))
def rounded_halves(kind: str, half: int) -> Case:
    """The two halves of each head change places, as in RoPE; halves of 8 cut through a block of rows."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", [1, 1, 64]))
    w, given = stored(b, "w", (96, 64), kind, "blocks")
    y = b.add("matmul", x, w, activation_group=32)
    heads = 96 // (2 * half)
    z = view(b, y, [1, heads, 1, 2 * half], "i0", "i2", f"{2 * half}*i1 + i3")
    low, high = (view(b, z, [1, heads, 1, half], "i0", "i1", "i2", e) for e in ("i3", f"i3 + {half}"))
    turned = b.add("concat", b.add("neg", high), low, axis=3)
    made = finish(b, b.add("add", z, turned))
    return Case(made.module, made.dims, given)


@case("quantized_parts", *((kind, "rows", rows) for kind in KINDS for rows in ("one", "four", "many")))
def quantized_parts(kind: str, layout: str, rows: str) -> Case:
    """A product over codes in two parts along K, as split-K makes it."""
    b = Builder()
    x = b.param_value("x", rows_type(DType.f32, rows, 128))
    w, given = stored(b, "w", (80, 128), kind, layout)
    return Case(*parts_product(b, x, w), given)


@case("quantized_table", *FORMS)
def quantized_table(kind: str, layout: str) -> Case:
    """Rows of an embedding that is stored as codes."""
    b = Builder()
    ids = b.param_value("ids", tensor_type("i64", ["B", "S"]))
    table, given = stored(b, "table", (48, 64), kind, layout)
    made = finish(b, b.add("gather", table, ids, axis=0), B=2, S=5)
    picked = torch.randint(0, 48, (2, 5), generator=torch.Generator().manual_seed(5))
    return Case(made.module, made.dims, {**given, "ids": picked})
