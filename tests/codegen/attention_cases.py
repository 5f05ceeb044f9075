"""Hand-built kernels around attention and its parts, for the list in ``triton_cases``."""

from __future__ import annotations

from dataclasses import replace

import torch

from tilewright.ir.builder import Builder
from tilewright.ir.types import DType, concrete, tensor_type

from .kernel_case import FLOATS, Case, case, finish, view


def attend(opcode: str, dtype: DType, size: int, **attrs: object) -> Case:
    """Six query heads over two KV heads; ``mask`` hides a left margin, and all of the last row."""
    b = Builder()
    queries, keys, groups = attrs.pop("queries", "S"), attrs.pop("keys", "T"), attrs.pop("groups", 2)
    q = b.param_value("q", tensor_type(dtype, ["B", 6, queries, size]))
    stored = attrs.pop("stored", dtype)
    k, v = (b.param_value(n, tensor_type(stored, ["B", groups, keys, size])) for n in "kv")
    types = {
        "mask": tensor_type("bool", ["B", keys]), "sinks": tensor_type(dtype, [6]), "slopes": tensor_type("f32", [6]),
        "distances": tensor_type("f32", [6, 27]), "reach": tensor_type("i64", ["B", queries]),
        "bias": tensor_type(dtype, [*attrs.pop("bias", ("B", 6, queries)), keys]),
    }  # fmt: skip
    extras = [b.param_value(name, types[name]) for name in attrs.get("extras", ())]
    full = {"scale": size**-0.5, "causal": True, "window": 0, "softcap": 0.0, **attrs}
    outs = b.add_multi(opcode, q, k, v, *extras, **full)  # type: ignore[arg-type]
    if opcode == "attention":
        flat = view(b, outs[0], ["B", queries, 6 * size], "i0", f"i2 // {size}", "i1", f"i2 % {size}")
        outs = (flat,)
    made = finish(b, *outs, B=3, S=19, T=45)
    count = {"T": 45, "S": 19}.get(keys, keys)
    valid = torch.ones(3, count, dtype=torch.bool)
    valid[1, : 2 * count // 3] = False
    valid[2] = False
    return Case(
        made.module,
        made.dims,
        {"mask": valid, "slopes": torch.linspace(-0.2, 0.6, 6), "reach": blocks(3, 19, 45 - 19)},
    )


def blocks(batch: int, tokens: int, past: int) -> torch.Tensor:
    """The last key that each query sees, i64[batch, tokens]: its own, or that of a block in which all see each other;
    none, one up to the end, and one in the middle."""
    reach = torch.arange(past, past + tokens).repeat(batch, 1)
    reach[1, 3:] = past + tokens - 1
    reach[2, 2:9] = past + 8
    return reach


@case("attention", *FLOATS, (DType.f64,))
def attention(dtype: DType) -> Case:
    return attend("attention", dtype, 16, slot="", extras=("mask",))


@case("attention_long", (DType.f32, 0), (DType.bf16, 0), (DType.bf16, 100))
def attention_long(dtype: DType, window: int) -> Case:
    """Several steps of keys, of which the mask or a window hides whole ones, and more rows than share one."""
    return attend("attention", dtype, 16, slot="", extras=("mask",), queries=66, keys=520, window=window)


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


@case(
    "attention_around",
    *((d, w, a) for d in (DType.f32, DType.bf16, DType.f64) for w, a in ((10, 10), (3, 90), (0, 5))),
)
def attention_around(dtype: DType, window: int, ahead: int) -> Case:
    """Keys around each query, not as many on both sides; whole steps of keys are hidden before and after them."""
    bounds = {"causal": False, "window": window, "ahead": ahead}
    return attend("attention", dtype, 16, slot="", extras=("mask",), queries=130, keys=300, **bounds)


@case(
    "attention_bias",
    *((d, q, k) for d in (DType.f32, DType.bf16, DType.f16) for q, k in (("S", 300), (1, 150))),
    (DType.f64, "S", "T"),
)
def attention_bias(dtype: DType, queries: object, keys: object) -> Case:
    """An array of biases, some of which mask: all of a row's for one row; keys that come after their query too."""
    made = attend(
        "attention", dtype, 16, slot="", extras=("mask", "bias"), queries=queries, keys=keys, causal=False
    )
    bias = torch.randn(concrete(made.module.main.params[4].shape, made.dims), dtype=torch.float64)
    bias[0, :, :, 5:11] = -torch.inf
    bias[1, 2, 0] = -torch.inf
    bias[1, 3, :, 20:] = torch.finfo(dtype.torch).min
    return replace(made, given={**made.given, "bias": bias.to(dtype.torch)})


@case(
    "attention_bias_shared", ("B11", "S"), ("1HS", "S"), ("11S", "S"), ("111", "S"), ("BH1", "S"), ("1H1", 1)
)
def attention_bias_shared(dims: str, queries: object) -> Case:
    """Biases that batch rows, heads or queries have in common, added to capped scores."""
    shape = [{"B": "B", "H": 6, "S": "S", "1": 1}[d] for d in dims]
    extras = ("bias",)
    return attend(
        "attention", DType.f32, 16, slot="", extras=extras, queries=queries, bias=shape, softcap=2.0
    )


@case("attention_split_bias", *FLOATS)
def attention_split_bias(dtype: DType) -> Case:
    return attend("attention_split", dtype, 16, queries=1, splits=4, extras=("bias",))


@case("attention_reach", *((d, w) for d in (DType.f32, DType.bf16, DType.f64) for w in (0, 7)))
def attention_reach(dtype: DType, window: int) -> Case:
    """Queries that see beyond themselves; a window hides nothing that comes after its query."""
    return attend("attention", dtype, 16, slot="", extras=("mask", "reach"), window=window)


@case("attention_split_distances", *FLOATS)
def attention_split_distances(dtype: DType) -> Case:
    """Each chunk measures distances from the query, as with slopes; added to capped scores."""
    return attend("attention_split", dtype, 16, queries=1, splits=4, extras=("distances",), softcap=2.0)


@case("attention_all_extras", ("S",), (1,))
def attention_all_extras(queries: object) -> Case:
    extras = ("mask", "sinks", "slopes", "distances", "bias")
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
