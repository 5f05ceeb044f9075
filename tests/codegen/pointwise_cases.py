"""Hand-built kernels of pointwise ops, lookups and joins, for the list in ``triton_cases``."""

from __future__ import annotations

import torch

from tilewright.ir.builder import Builder
from tilewright.ir.index import parse_expr
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.types import DType, tensor_type

from .kernel_case import FLOATS, Case, case, finish, view


@case("unary", *((n,) for n, row in sorted(POINTWISE.items()) if row.arity == 1 and n not in ("cast", "not")))
def unary(op: str) -> Case:
    b = Builder()
    x = b.param_value("x", tensor_type("f32", ["B", 37]))
    positive = b.add("add", b.add("abs", x), b.const(0.01, DType.f32))
    return finish(b, b.add(op, positive if op in ("log", "sqrt", "rsqrt") else x), B=3)


@case("angles", ("sin",), ("cos",))
def angles(op: str) -> Case:
    """Positions times frequencies, as rotary embeddings have them, and multiples of an eighth of a turn."""
    b = Builder()
    made = finish(b, b.add(op, b.param_value("x", tensor_type("f32", [3000]))))
    positions = torch.cat([torch.arange(0, 131072, 131), torch.arange(130000, 131072)])[:, None]
    far = (positions * torch.tensor([1.0, -1.0, 0.75, 0.01])).flatten()
    eighths = torch.arange(-500, 500) * (torch.pi / 4)
    return Case(made.module, {}, {"x": torch.cat([far[torch.randperm(len(far))[:2000]], eighths]).float()})


@case("halves", ("f32",), ("f64",))
def halves(dtype: str) -> Case:
    """Of two nearest integers the even one; floats so large that they have no fraction stay as they are."""
    b = Builder()
    x = torch.cat(
        [torch.arange(-9, 10) / 2, torch.tensor([0.5 - 2**-25, 2**22 + 0.5, -(2**22) - 1.5, 2**23 + 1])]
    )
    x = torch.cat([x, torch.tensor([1e30, -1e30])]).to(DType(dtype).torch)
    made = finish(b, b.add("round", b.param_value("x", tensor_type(dtype, [len(x)]))))
    return Case(made.module, made.dims, {"x": x})


@case("binary", *((n,) for n, row in sorted(POINTWISE.items()) if row.arity == 2 and row.domain != "int"))
def binary(op: str) -> Case:
    b = Builder()
    x = b.param_value("x", tensor_type("f32", ["B", 5, 1]))
    y = b.param_value("y", tensor_type("f32", [1, 5, 7]))
    return finish(b, b.add(op, b.add("abs", x) if op == "pow" else x, y), B=3)


@case(
    "integers",
    *((n,) for n in ("add", "sub", "mul", "div", "mod", "maximum", "and", "or", "xor", "lt", "neg")),
)
def integers(op: str) -> Case:
    b = Builder()
    x = b.param_value("x", tensor_type("i64", [11]))
    y = b.param_value("y", tensor_type("i64", [11]))
    made = finish(b, b.add(op, x) if op == "neg" else b.add(op, x, y))
    given = {"x": torch.arange(-5, 6) * 3, "y": torch.tensor([1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 7])}
    return Case(made.module, made.dims, given)


@case("remainder", ("f32",), ("f64",))
def remainder(dtype: str) -> Case:
    """Quotients that round to integers, or are larger than floats count by ones; infinities, zeros, a constant."""
    pairs = torch.tensor(
        [
            [1.0, 0.1], [-1.0, 0.1], [1.0, -0.1], [-1.0, -0.1], [5.0, torch.inf], [-5.0, torch.inf],
            [5.0, -torch.inf], [torch.inf, 2.0], [1.0, 0.0], [0.0, 0.0], [0.0, 3.0], [6.0, -3.0],
            [1e30, 0.7], [-1e30, 0.7], [torch.nan, 1.0], [1.0, torch.nan], [-5.5, 2.25],
        ]
    ).to(DType(dtype).torch)  # fmt: skip
    b = Builder()
    x, y = (b.param_value(name, tensor_type(dtype, [len(pairs)])) for name in "xy")
    rest, zero = b.add("mod", x, y), b.const(0.0, DType(dtype))
    infinite = b.add("eq", rest, y)  # told apart, since errors are measured of finite numbers
    tenth = b.const(torch.tensor(0.1, dtype=DType(dtype).torch).item(), DType(dtype))
    made = finish(b, infinite, b.add("where", infinite, zero, rest), b.add("mod", x, tenth))
    return Case(made.module, made.dims, {"x": pairs[:, 0].contiguous(), "y": pairs[:, 1].contiguous()})


@case("select")
def select() -> Case:
    """where, logical not, casts between kinds, iota, dim, a constant-only subtree."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", ["B", "S"]))
    n = b.add("iota", type=tensor_type("i64", ["S"]))
    last = b.add(
        "sub", b.add("dim", type=tensor_type("i64", []), expr=parse_expr("S")), b.const(1, DType.i64)
    )
    odd = b.add("not", b.add("eq", b.add("mod", n, b.const(2, DType.i64)), b.const(0, DType.i64)))
    weight = b.add("cast", odd, type=tensor_type("f32", ["S"]))
    constant = b.add("exp", b.const(0.5, DType.f32))
    kept = b.add("where", b.add("eq", n, last), b.add("mul", x, constant), b.add("add", x, weight))
    whole = b.add("cast", kept, type=tensor_type("i32", ["B", "S"]))
    return finish(b, kept, whole, b.add("cast", whole, type=tensor_type("bool", ["B", "S"])), B=2, S=9)


@case("embedding", *FLOATS)
def embedding(dtype: DType) -> Case:
    b = Builder()
    ids = b.param_value("ids", tensor_type("i64", ["B", "S"]))
    table = b.param_value("table", tensor_type(dtype, [20, 24]))
    places = b.param_value("places", tensor_type(dtype, [40, 24]))
    n = b.add("iota", type=tensor_type("i64", ["S"]))
    made = finish(
        b, b.add("add", b.add("gather", table, ids, axis=0), b.add("gather", places, n, axis=0)), B=2, S=5
    )
    return Case(made.module, made.dims, {"ids": torch.arange(10).reshape(2, 5) * 7 % 20})


@case("concat")
def concat() -> Case:
    b = Builder()
    x = b.param_value("x", tensor_type("f32", ["B", "S", 6]))
    half = view(b, x, ["B", "S", 3], "i0", "i1", "i2"), view(b, x, ["B", "S", 3], "i0", "i1", "i2 + 3")
    rotated = b.add("concat", b.add("neg", half[1]), half[0], axis=2)
    return finish(b, b.add("add", rotated, x), B=2, S=4)
