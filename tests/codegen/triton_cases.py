"""Small fused kernels, built by hand, that exercise every template of the Triton backend.

Each case is one module whose entry holds one ``kernel`` op. The interpreter tests, the offline compilation tests and
the GPU tests all run this list; the reference evaluator says what is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tilewright.ir.index import IndexMap, as_expr, parse_expr
from tilewright.ir.module import Function, Loc, Module, Op, make_attrs
from tilewright.ir.ops import Builder
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.recurrent import state_of
from tilewright.ir.types import DType, TensorType, Value, concrete, tensor_type

CAPACITY = 48
RANGES = {"B": (1, 4), "S": (1, 40), "T": (1, CAPACITY), "L": (1, 40)}


@dataclass(frozen=True)
class Case:
    """A module, sizes of its dims, and tensors for its parameters that random numbers would not do for."""

    module: Module
    dims: dict[str, int]
    given: dict[str, Tensor] = field(default_factory=dict)

    @property
    def kernel(self) -> Op:
        (op,) = self.module.main.ops
        return op

    def meanings(self) -> tuple[Module, ...]:
        """The modules of which a kernel may compute any: with activations rounded where it may, and without."""
        body = tuple(op.with_attrs(activation_group=None) for op in self.kernel.body)
        if body == self.kernel.body:
            return (self.module,)
        main = self.module.main.with_ops((replace(self.kernel, body=body),))
        return self.module, self.module.with_functions((main,))

    def inputs(self) -> dict[str, Tensor]:
        """A tensor for every parameter; deterministic."""
        generator = torch.Generator().manual_seed(7)
        found = {}
        for p in self.module.main.params:
            shape = concrete(p.shape, self.dims)
            drawn = torch.randn(shape, generator=generator)
            found[p.name] = self.given.get(p.name, drawn.to(p.dtype.torch))
        return found

    @property
    def slots(self) -> dict[Value, str]:
        """The results that live in the request's state, and their slots."""
        states = ((state_of(op), str(op.attr("slot"))) for op in self.kernel.body)
        return {value: slot for value, slot in states if value is not None}

    def past(self) -> dict[str, Tensor]:
        """What the state holds before the kernel runs, by slot."""
        generator = torch.Generator().manual_seed(8)
        past = self.dims.get("T", 0) - self.dims.get("S", 1)
        found = {}
        for op in self.kernel.body:
            if op.opcode == "append":
                b, g, _, d = op.result.shape
                shape = concrete((b, g, as_expr(past), d), self.dims)
                found[op.attr("slot")] = torch.randn(shape, generator=generator).to(op.result.dtype.torch)
            elif (held := state_of(op)) is not None:
                drawn = torch.randn(concrete(held.shape, self.dims), generator=generator)
                found[op.attr("slot")] = drawn.to(held.dtype.torch)
        return found

    def exact_past(self) -> dict[str, Tensor]:
        """The same in float64; f8 is a form of storage and stays what it is."""
        return {n: t if t.dtype is DType.f8.torch else t.double() for n, t in self.past().items()}


def comparable(tensor: Tensor) -> Tensor:
    """The tensor, or its codes where it is f8: those are exact, and torch compares no f8."""
    return tensor.view(torch.uint8) if tensor.dtype is DType.f8.torch else tensor


CASES: dict[str, Callable[[], Case]] = {}


def case(name: str, *parameters: tuple[object, ...]) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Register a case, once per tuple of parameters."""

    def register(build: Callable[..., Case]) -> Callable[..., Case]:
        for values in parameters or ((),):
            full = "-".join([name, *(str(v.value if isinstance(v, DType) else v) for v in values)])
            CASES[full] = lambda values=values: build(*values)
        return build

    return register


def finish(b: Builder, *results: Value, **dims: int) -> Case:
    """One kernel of all that the builder holds."""
    used = {v for op in b.ops for v in op.operands}
    operands = tuple(p for p in b.params if p in used)
    kernel = Op("kernel", operands, make_attrs({"name": "fused"}), results, Loc(), tuple(b.ops))
    function = Function("main", tuple(b.params), (kernel,), results)
    return Case(Module((function,)).with_symbols(**RANGES), dims)


def view(b: Builder, x: Value, shape: list[int | str], *index: str) -> Value:
    """A view whose result element (i0, i1, ..) is ``x[index]``."""
    index_map = IndexMap(len(shape), tuple(map(parse_expr, index)))
    return b.add("view", x, type=TensorType(x.dtype, tuple(map(as_expr, shape))), map=index_map)


def cast(b: Builder, x: Value, dtype: DType) -> Value:
    return x if x.dtype is dtype else b.add("cast", x, type=x.type.with_dtype(dtype))


def rms_scale(b: Builder, x: Value) -> Value:
    """1 / sqrt(mean(x^2) + eps) of the last axis, in float32."""
    x = cast(b, x, DType.f32)
    total = b.add("reduce", b.add("mul", x, x), kind="sum", axes=(x.type.rank - 1,), keepdim=True)
    mean = b.add("div", total, b.const(int(x.shape[-1]), DType.f32))
    return b.add("rsqrt", b.add("add", mean, b.const(1e-5, DType.f32)))


def layer_norm(b: Builder, x: Value, weight: Value, bias: Value) -> Value:
    """LayerNorm in float32, rounded to x's dtype."""
    dtype, x = x.dtype, cast(b, x, DType.f32)
    axis, count = (x.type.rank - 1,), b.const(int(x.shape[-1]), DType.f32)
    mean = b.add("div", b.add("reduce", x, kind="sum", axes=axis, keepdim=True), count)
    centred = b.add("sub", x, mean)
    square = b.add("reduce", b.add("mul", centred, centred), kind="sum", axes=axis, keepdim=True)
    scale = b.add("rsqrt", b.add("add", b.add("div", square, count), b.const(1e-5, DType.f32)))
    normal = b.add("mul", b.add("mul", centred, scale), cast(b, weight, DType.f32))
    return cast(b, b.add("add", normal, cast(b, bias, DType.f32)), dtype)


FLOATS = ((DType.f32,), (DType.bf16,), (DType.f16,))


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


def rows_type(dtype: DType, rows: str, width: int) -> TensorType:
    """[B, S, width] for prefill, [1, 1, width] for decode of one sequence, [4, 1, width] for a batch of four."""
    shape = {"many": ["B", "S", width], "one": [1, 1, width], "four": [4, 1, width]}[rows]
    return tensor_type(dtype, shape)


ROWS = tuple((d, r) for (d,) in FLOATS for r in ("many", "one", "four"))


@case("linear", *ROWS, (DType.f64, "many"))
def linear(dtype: DType, rows: str) -> Case:
    """Bias, GELU and a residual in the epilogue; an odd K and N, so that every tail is masked."""
    return biased(dtype, rows, 70)


def biased(dtype: DType, rows: str, k: int, **dims: int) -> Case:
    b = Builder()
    x = b.param_value("x", rows_type(dtype, rows, k))
    w, c = b.param_value("w", tensor_type(dtype, [90, k])), b.param_value("c", tensor_type(dtype, [90]))
    y = b.add("add", b.add("matmul", x, w), c)
    half = b.add("mul", y, b.const(0.5, dtype))
    gelu = b.add(
        "mul",
        half,
        b.add("add", b.add("erf", b.add("mul", y, b.const(0.7071067811865476, dtype))), b.const(1.0, dtype)),
    )
    return finish(b, b.add("add", gelu, b.param_value("residual", y.type)), **{"B": 2, "S": 19, **dims})


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


@case("one_row")
def one_row() -> Case:
    """Reductions to a single number, stored as such and with the row it normalises."""
    b = Builder()
    x = b.param_value("x", tensor_type("f32", [1, 1, 50]))
    scale = rms_scale(b, x)
    return finish(b, view(b, scale, [], "0", "0", "0"), b.add("mul", x, scale))


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


@case("nested")
def nested() -> Case:
    """A product of a product: reductions that depend on each other's axis."""
    b = Builder()
    x, w, v = (b.param_value(n, tensor_type("f32", [6, 6])) for n in "xwv")
    return finish(b, b.add("matmul", b.add("tanh", b.add("matmul", x, w)), v))


def attend(opcode: str, dtype: DType, size: int, **attrs: object) -> Case:
    """Six query heads over two KV heads; ``mask`` hides a left margin, and all of the last row."""
    b = Builder()
    queries, keys, groups = attrs.pop("queries", "S"), attrs.pop("keys", "T"), attrs.pop("groups", 2)
    q = b.param_value("q", tensor_type(dtype, ["B", 6, queries, size]))
    stored = attrs.pop("stored", dtype)
    k, v = (b.param_value(n, tensor_type(stored, ["B", groups, keys, size])) for n in "kv")
    types = {
        "mask": tensor_type("bool", ["B", keys]), "sinks": tensor_type(dtype, [6]), "slopes": tensor_type("f32", [6]),
        "distances": tensor_type("f32", [6, 27]),
    }  # fmt: skip
    extras = [b.param_value(name, types[name]) for name in attrs.get("extras", ())]
    full = {"scale": size**-0.5, "causal": True, "window": 0, "softcap": 0.0, **attrs}
    outs = b.add_multi(opcode, q, k, v, *extras, **full)  # type: ignore[arg-type]
    if opcode == "attention":
        flat = view(b, outs[0], ["B", queries, 6 * size], "i0", f"i2 // {size}", "i1", f"i2 % {size}")
        outs = (flat,)
    made = finish(b, *outs, B=3, S=19, T=45)
    valid = torch.ones(3, {"T": 45, "S": 19}.get(keys, keys), dtype=torch.bool)
    valid[1, :30] = False
    valid[2] = False
    return Case(made.module, made.dims, {"mask": valid, "slopes": torch.linspace(-0.2, 0.6, 6)})


@case("attention", *FLOATS, (DType.f64,))
def attention(dtype: DType) -> Case:
    return attend("attention", dtype, 16, slot="", extras=("mask",))


@case("attention_sinks", *((d, q) for d in (DType.f32, DType.bf16) for q in ("S", 1)), (DType.f64, "S"))
def attention_sinks(dtype: DType, queries: object) -> Case:
    """A score of each head that has no value; a row that may see no key gives zeros."""
    return attend("attention", dtype, 16, slot="", extras=("mask", "sinks"), queries=queries)


@case(
    "attention_slopes",
    *((d, q, 150) for d in (DType.f32, DType.bf16) for q in ("S", 1)),
    (DType.f64, "S", "T"),
)
def attention_slopes(dtype: DType, queries: object, keys: object) -> Case:
    """A bias by distance, of either sign, added to capped scores and before the mask; keys of one tile, and of more."""
    extras = ("mask", "slopes")
    return attend("attention", dtype, 16, slot="", extras=extras, queries=queries, keys=keys, softcap=2.0)


@case(
    "attention_distances",
    *((d, q, 150) for d in (DType.f32, DType.bf16) for q in ("S", 1)),
    (DType.f64, "S", "T"),
)
def attention_distances(dtype: DType, queries: object, keys: object) -> Case:
    """A table of biases by distance, shorter than the context at either side; keys that come after their query too."""
    extras = ("mask", "distances")
    return attend("attention", dtype, 16, slot="", extras=extras, queries=queries, keys=keys, causal=False)


@case("attention_split_distances", *FLOATS)
def attention_split_distances(dtype: DType) -> Case:
    """Each chunk measures distances from the query, as with slopes; added to capped scores."""
    return attend("attention_split", dtype, 16, queries=1, splits=4, extras=("distances",), softcap=2.0)


@case("attention_all_extras", ("S",), (1,))
def attention_all_extras(queries: object) -> Case:
    extras = ("mask", "sinks", "slopes", "distances")
    return attend("attention", DType.f32, 20, slot="", extras=extras, queries=queries, window=11)


@case("attention_window", (DType.f32,), (DType.f64,))
def attention_window(dtype: DType) -> Case:
    return attend("attention", dtype, 20, slot="", window=7, softcap=5.0)


@case("attention_encoder", (DType.f32,), (DType.bf16,))
def attention_encoder(dtype: DType) -> Case:
    return attend("attention", dtype, 16, slot="", causal=False, keys="S", extras=("mask",))


@case("attention_decode")
def attention_decode() -> Case:
    return attend("attention", DType.f32, 16, slot="", queries=1, window=9)


@case("attention_split", *FLOATS)
def attention_split(dtype: DType) -> Case:
    return attend("attention_split", dtype, 16, queries=1, splits=4, extras=("mask",))


@case("attention_split_slopes", *FLOATS)
def attention_split_slopes(dtype: DType) -> Case:
    """Each chunk measures distances from the query, not within itself. Without a mask: the highest score of a row that
    sees nothing is so large a number that it would hide what is wrong with the others."""
    return attend("attention_split", dtype, 16, queries=1, splits=4, extras=("slopes",), softcap=2.0)


@case("attention_own_heads", ("attention",), ("attention_split",))
def attention_own_heads(opcode: str) -> Case:
    """As many KV heads as query heads and one query: a tile of a single row."""
    extra = {"slot": ""} if opcode == "attention" else {"splits": 3}
    return attend(opcode, DType.f32, 16, queries=1, groups=6, **extra)


HOSTILE = tuple(
    (opcode, length, logits)
    for opcode in ("attention", "attention_split")
    for length, logits in ((1, "usual"), (13, "huge"), (17, "negative"), (33, "usual"))
)


@case("attention_hostile", *HOSTILE)
def attention_hostile(opcode: str, length: int, logits: str) -> Case:
    """One query against a single position, a prime number of them, one past a tile of 16 and of 32; scores in the
    thousands, and all far below zero."""
    extra = {"slot": ""} if opcode == "attention" else {"splits": 3}
    made = attend(opcode, DType.f32, 16, queries=1, **extra)
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(3, 6, 1, 16, generator=generator), torch.randn(3, 2, length, 16, generator=generator)
    if logits == "huge":
        q, k = 40 * q, 40 * k
    if logits == "negative":
        q, k = 40 * q.abs(), -40 * k.abs()
    return Case(made.module, {**made.dims, "S": 1, "T": length}, {"q": q, "k": k})


@case("attention_empty_splits")
def attention_empty_splits() -> Case:
    """More splits than positions are left by the window, and a chunk size that does not divide the context."""
    return attend("attention_split", DType.f32, 16, queries=1, splits=7, window=5)


from . import f8_cases, matrix_cases, quantized_cases, recurrent_cases  # noqa: E402, F401 - more, with the helpers above
