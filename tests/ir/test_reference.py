"""The reference evaluator against torch itself: what each op means, written a second time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilewright.ir.builder import Builder
from tilewright.ir.errors import VerifyError
from tilewright.ir.index import IndexMap, index_symbols, sym
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.parser import parse_module
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.reference import evaluate, join_scope
from tilewright.ir.types import DType, TensorType, Value, tensor_type

SYMBOLS = (("B", 1, 8), ("S", 1, 8), ("T", 1, 16))


def run_op(
    opcode: str,
    *args: Tensor,
    type: TensorType | None = None,
    dims: dict[str, int] | None = None,
    **attrs: object,
) -> Tensor:
    """Build a function of one op on inputs of these shapes, and run it."""
    b = Builder()
    params = [
        b.param_value(f"p{n}", tensor_type(DType.from_torch(a.dtype), a.shape)) for n, a in enumerate(args)
    ]
    result = b.add(opcode, *params, type=type, **attrs)  # type: ignore[arg-type]
    module = Module((Function("main", tuple(b.params), tuple(b.ops), (result,)),), SYMBOLS)
    (found,) = evaluate(module, list(args), {}, dims or {})
    return found


X = torch.linspace(-2.3, 2.9, 12).reshape(3, 4)
Y = torch.linspace(3.1, -1.7, 12).reshape(3, 4)
P = X.abs() + 0.1
I = torch.tensor([[-7, -1, 0, 5], [3, 2, 9, -4], [1, 8, -3, 6]])  # noqa: E741
J = torch.tensor([[2, 3, 1, 4], [5, 2, 3, 3], [4, 7, 2, 5]])
U, V = X > 0, Y > 0

CASES: dict[str, tuple[tuple[Tensor, ...], Callable[..., Tensor]]] = {
    "add": ((X, Y), lambda a, b: torch.add(a, b)),
    "sub": ((X, Y), lambda a, b: torch.sub(a, b)),
    "mul": ((X, Y), lambda a, b: torch.mul(a, b)),
    "div": ((X, P), lambda a, b: torch.div(a, b)),
    "mod": ((I, J), lambda a, b: a - b * torch.floor(a.double() / b).long()),
    "pow": ((P, Y), lambda a, b: torch.exp(b * torch.log(a))),
    "maximum": ((X, Y), lambda a, b: torch.where(a > b, a, b)),
    "minimum": ((X, Y), lambda a, b: torch.where(a < b, a, b)),
    "neg": ((X,), lambda a: 0 - a),
    "abs": ((X,), lambda a: torch.where(a < 0, -a, a)),
    "exp": ((X,), lambda a: torch.pow(math.e, a)),
    "log": ((P,), lambda a: torch.log2(a) * math.log(2)),
    "sqrt": ((P,), lambda a: a**0.5),
    "rsqrt": ((P,), lambda a: a**-0.5),
    "sin": ((X,), lambda a: torch.cos(a - math.pi / 2)),
    "cos": ((X,), lambda a: torch.sin(a + math.pi / 2)),
    "tanh": ((X,), lambda a: 1 - 2 / (torch.exp(2 * a) + 1)),
    "erf": ((X,), lambda a: 2 * torch.special.ndtr(a * math.sqrt(2)) - 1),
    "sigmoid": ((X,), lambda a: 1 / (1 + torch.exp(-a))),
    "floor": ((X,), lambda a: a.double().apply_(math.floor).float()),
    "round": ((X,), lambda a: a.double().apply_(round).float()),
    "eq": ((I, J), lambda a, b: ~(a != b)),
    "ne": ((I, J), lambda a, b: (a - b).bool()),
    "lt": ((X, Y), lambda a, b: (b - a) > 0),
    "le": ((I, J), lambda a, b: ~(a > b)),
    "gt": ((X, Y), lambda a, b: (a - b) > 0),
    "ge": ((I, J), lambda a, b: ~(a < b)),
    "and": ((U, V), lambda a, b: (a.int() * b.int()).bool()),
    "or": ((U, V), lambda a, b: (a.int() + b.int()).bool()),
    "xor": ((U, V), lambda a, b: a != b),
    "shr": ((I, J), lambda a, b: torch.div(a, 2**b, rounding_mode="floor")),
    "not": ((U,), lambda a: a == False),  # noqa: E712
    "where": ((U, X, Y), lambda c, a, b: c.float() * a + (1 - c.float()) * b),
}


def test_every_pointwise_op_has_a_case() -> None:
    """A new op would go untested."""
    assert set(CASES) | {"cast"} == set(POINTWISE)


@pytest.mark.parametrize("opcode", CASES)
def test_pointwise_means_what_its_name_says(opcode: str) -> None:
    """Two ops swapped, or an operand order, in the table that defines them."""
    args, expected = CASES[opcode]
    torch.testing.assert_close(run_op(opcode, *args), expected(*args), rtol=1e-5, atol=1e-5)


def test_integer_division_rounds_down() -> None:
    """Positions before the start of a window would become token 0."""
    assert torch.equal(run_op("div", I, J), torch.floor(I.double() / J).long())
    assert torch.equal(run_op("div", I, J) * J + run_op("mod", I, J), I)


def test_broadcasting_is_numpys() -> None:
    """A bias added along rows."""
    assert torch.equal(run_op("add", X, Y[0]), X + Y[0])
    assert torch.equal(run_op("add", X[:, :1], Y[None]), X[:, :1] + Y[None])


@pytest.mark.parametrize(
    ("source", "target"),
    [("f32", "i64"), ("f32", "bf16"), ("i64", "f32"), ("bool", "f32"), ("f32", "bool"), ("i64", "i32")],
)
def test_cast(source: str, target: str) -> None:
    """Integers of negative floats round towards zero; bf16 rounds to nearest."""
    x = (X * 3).to(DType(source).torch)
    found = run_op("cast", x, type=tensor_type(target, x.shape))
    assert torch.equal(found, x.to(DType(target).torch))
    assert found.dtype == DType(target).torch


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("kind", ["sum", "max", "min", "prod", "any", "all"])
def test_reduce(kind: str, axes: tuple[int, ...], keepdim: bool) -> None:
    """A reduction over the wrong axes, or one that drops a dim."""
    x = torch.randn(2, 3, 4)
    if kind in ("any", "all"):
        x = x > (0.8 if kind == "any" else -0.8)
    expected = x.movedim(axes, tuple(range(-len(axes), 0))).flatten(-len(axes))
    expected = {
        "sum": lambda t: t.sum(-1), "max": lambda t: t.max(-1).values, "min": lambda t: t.min(-1).values,
        "prod": lambda t: t.prod(-1), "any": lambda t: t.any(-1), "all": lambda t: t.all(-1),
    }[kind](expected)  # fmt: skip
    for axis in axes if keepdim else ():
        expected = expected.unsqueeze(axis)
    torch.testing.assert_close(run_op("reduce", x, kind=kind, axes=axes, keepdim=keepdim), expected)


VIEWS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "transpose": ("(i0, i1, i2) -> (i1, i0, i2)", lambda x: x.transpose(0, 1)),
    "flip": ("(i0, i1, i2) -> (1 - i0, i1, i2)", lambda x: x.flip(0)),
    "step": ("(i0, i1, i2) -> (i0, i1, 2*i2 + 1)", lambda x: x[..., 1::2]),
    "pick": ("(i0, i1) -> (1, i0, i1)", lambda x: x[1]),
    "expand": ("(i0, i1, i2, i3) -> (i0, i2, i3)", lambda x: x[:, None].expand(2, 5, 3, 4)),
    "repeat": ("(i0, i1, i2) -> ((i0 % 2), i1, i2)", lambda x: x.repeat(3, 1, 1)),
    "repeat interleaved": ("(i0, i1, i2) -> ((i0 // 3), i1, i2)", lambda x: x.repeat_interleave(3, 0)),
    "flatten": ("(i0) -> ((i0 // 12), ((i0 // 4) % 3), (i0 % 4))", lambda x: x.flatten()),
    "roll": ("(i0, i1, i2) -> (i0, i1, ((i2 + 1) % 4))", lambda x: x.roll(-1, 2)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_view(name: str) -> None:
    """An index map read the wrong way round."""
    x = torch.randn(2, 3, 4)
    text, rule = VIEWS[name]
    expected = rule(x)
    shape = ", ".join(map(str, expected.shape))
    module = parse_module(
        f"func @main(%x: f32[2, 3, 4]) -> (%y) {{ %y = view %x {{map = {text}}} : f32[{shape}] }}"
    )
    (found,) = evaluate(module, [x], {}, {})
    assert torch.equal(found, expected)


def test_sources_and_movers() -> None:
    """iota, dim, const, concat and gather."""
    assert run_op("iota", type=tensor_type("i64", ["S"]), dims={"S": 5}).tolist() == [0, 1, 2, 3, 4]
    assert (
        run_op("dim", type=tensor_type("i64"), expr=sym("B") * sym("S"), dims={"B": 2, "S": 5}).item() == 10
    )
    assert run_op("const", type=tensor_type("bf16"), value=0.1).item() == torch.tensor(0.1).bfloat16().item()
    assert torch.equal(run_op("concat", X, Y, X, axis=1), torch.cat([X, Y, X], 1))
    index = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(run_op("gather", X, index, axis=0), X[index])
    assert torch.equal(run_op("gather", X, index, axis=1), X[:, index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul_takes_the_weight_as_linear_does(dtype: torch.dtype) -> None:
    """The weight's rows and columns swapped."""
    x, w = torch.randn(2, 3, 6).to(dtype), torch.randn(5, 6).to(dtype)
    torch.testing.assert_close(run_op("matmul", x, w), F.linear(x, w))
    keys = torch.randn(2, 5, 6).to(dtype)
    torch.testing.assert_close(run_op("matmul", x, keys), torch.einsum("bmk,bnk->bmn", x, keys))
    torch.testing.assert_close(run_op("matmul", x[0, 0], w), F.linear(x[0, 0], w))


def test_a_call_finds_the_weights_of_its_scope() -> None:
    """Every layer would run with the weights of the first."""
    module = parse_module("""
    func @main(%x: f32[4]) -> (%b) {
      %a = call %x {callee = "layer0", scope = "layers.0"} : f32[4]
      %b = call %a {callee = "layer0", scope = "layers.1"} : f32[4]
    }
    func @layer0(%x: f32[4]) -> (%y) {
      %w = param {name = "norm.weight"} : f32[4]
      %y = mul %x, %w : f32[4]
    }""")
    weights = {"layers.0.norm.weight": torch.full((4,), 2.0), "layers.1.norm.weight": torch.full((4,), 5.0)}
    (y,) = evaluate(module, {"x": torch.ones(4)}, weights, {})
    assert y.tolist() == [10.0] * 4
    with pytest.raises(VerifyError, match=r"no weight named 'layers.1.norm.weight'"):
        evaluate(module, {"x": torch.ones(4)}, {"layers.0.norm.weight": torch.ones(4)}, {})


def test_scopes_join() -> None:
    """A leading or trailing dot in a weight's name."""
    assert [join_scope(*p) for p in [("", "a"), ("a", ""), ("a", "b"), ("", "")]] == ["a", "a", "a.b", ""]


def test_exact_mode_computes_in_float64() -> None:
    """The yardstick for half precision would itself be rounded."""
    text = "func @main(%x: bf16[64], %w: bf16[1, 64]) -> (%y) { %y = matmul %x, %w : bf16[1] }"
    x, w = torch.randn(64).bfloat16(), torch.randn(1, 64).bfloat16()
    (rounded,) = evaluate(parse_module(text), [x, w], {}, {})
    (exact,) = evaluate(parse_module(text), [x, w], {}, {}, exact=True)
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float64)
    torch.testing.assert_close(exact, x.double() @ w[0].double()[:, None], rtol=1e-14, atol=1e-14)
    assert rounded.double() != exact


def test_a_shape_other_than_declared_is_an_error() -> None:
    """A wrong type would surface in a kernel instead."""
    module = parse_module("symbol B [1, 4]\nfunc @main(%x: f32[B]) -> (%y) { %y = neg %x : f32[B] }")
    with pytest.raises(VerifyError, match=r"evaluated to \(3,\), declared \(2,\)"):
        evaluate(module, [torch.ones(3)], {}, {"B": 2})


# -- attention ---------------------------------------------------------------------------------------------------


def attention_module(
    opcode: str, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor], **attrs: object
) -> Module:
    named = {"q": q, "k": k, "v": v, **extras}
    values = [Value(n, tensor_type(DType.from_torch(t.dtype), t.shape)) for n, t in named.items()]
    b = Builder()
    results = b.add_multi(opcode, *values, extras=tuple(extras) or None, **attrs)  # type: ignore[arg-type]
    return Module((Function("main", tuple(values), tuple(b.ops), results),), SYMBOLS)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: dict[str, Tensor],
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    ahead: int | None = None,
) -> Tensor:
    """torch's own attention with an explicit mask and bias; with a softcap, written out."""
    s, t = q.shape[2], k.shape[2]
    query, key = torch.arange(t - s, t)[:, None], torch.arange(t)
    valid = torch.ones(s, t, dtype=torch.bool)
    if window:
        valid &= key > query - window
    if ahead:
        valid &= key < query + ahead
    valid = valid[None, None].expand(q.shape[0], q.shape[1], s, t)
    if causal:
        valid = valid & (key <= extras.get("reach", query[:, 0].expand(q.shape[0], s))[:, None, :, None])
    if "mask" in extras:
        valid = valid & extras["mask"][:, None, None]
    bias = torch.zeros(q.shape[1], s, t)
    if (
        "slopes" in extras
    ):  # by position of the key alone, as models have it: a row's softmax cancels the rest
        bias = extras["slopes"][:, None, None] * key + bias
    if "distances" in extras:  # spelled out: a list per head, whose ends go on
        for head, numbers in enumerate(extras["distances"].tolist()):
            middle = len(numbers) // 2
            places = (key - query + middle).clamp(0, len(numbers) - 1)
            bias[head] += torch.tensor([[numbers[p] for p in row] for row in places.tolist()])
    bias = bias + extras.get("bias", torch.zeros(()))
    if not softcap:
        added = bias.masked_fill(~valid, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale, enable_gqa=True)
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("bhsd,bhtd->bhst", q, k.repeat_interleave(group, 1)) * scale
    scores = (softcap * torch.tanh(scores / softcap) + bias).masked_fill(~valid, -torch.inf)
    return scores.softmax(-1) @ v.repeat_interleave(group, 1)


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, object]]:
    """q, k, v, mask and biases, and attributes; the last key is always valid, so every causal row has one."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    b, g, group = (draw(st.integers(1, 2)) for _ in range(3))
    s = draw(st.integers(1, 4))
    t = s + draw(st.integers(0, 4))
    d, dv = draw(st.sampled_from([2, 8])), draw(st.sampled_from([2, 8]))
    q = torch.randn(b, g * group, s, d, generator=generator)
    k, v = torch.randn(b, g, t, d, generator=generator), torch.randn(b, g, t, dv, generator=generator)
    extras = {}
    if draw(st.booleans()):
        extras["mask"] = torch.rand(b, t, generator=generator) < 0.7
        extras["mask"][:, t - s :] = True
    if draw(st.booleans()):
        extras["slopes"] = torch.rand(g * group, generator=generator)
    if columns := draw(st.sampled_from([0, 1, 5, 13])):
        extras["distances"] = torch.randn(g * group, columns, generator=generator)
    if draw(st.booleans()):
        shape = [n if draw(st.booleans()) else 1 for n in (b, g * group, s)]
        extras["bias"] = torch.randn(*shape, t, generator=generator)
        extras["bias"][..., : t - s][torch.rand(*shape, t - s, generator=generator) < 0.2] = -torch.inf
    if causal := draw(st.booleans()):
        further = torch.arange(t - s, t) + torch.randint(0, 3, (b, s), generator=generator)
        if draw(st.booleans()):
            extras["reach"] = further.clamp(max=t - 1).cummax(1).values
    attrs = {
        "causal": causal, "window": draw(st.sampled_from([0, 1, 3])),
        "softcap": draw(st.sampled_from([0.0, 2.0])), "scale": draw(st.sampled_from([0.3, 1.0])),
    }  # fmt: skip
    if not causal:
        attrs["ahead"] = draw(st.sampled_from([None, 1, 3]))
    return q, k, v, extras, attrs


@given(attentions())
def test_attention_is_torchs(
    case: tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, object]],
) -> None:
    """Heads grouped wrongly, the causal diagonal or window off by one, a mask applied to queries, a bias of another
    head or of the wrong sign."""
    q, k, v, extras, attrs = case
    module = attention_module("attention", q, k, v, extras, slot="", **attrs)
    (found,) = evaluate(module, [q, k, v, *extras.values()], {}, {})
    torch.testing.assert_close(found, reference_attention(q, k, v, extras, **attrs), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@given(attentions(), st.integers(1, 9))
def test_merged_partials_are_attention(
    case: tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, object]], splits: int
) -> None:
    """Decode attention: partials that are not weighted by their maxima, or an empty chunk that spoils the sum."""
    q, k, v, extras, attrs = case
    inputs = [q, k, v, *extras.values()]
    acc, top, total = evaluate(
        attention_module("attention_split", q, k, v, extras, splits=splits, **attrs), inputs, {}, {}
    )
    (whole,) = evaluate(attention_module("attention", q, k, v, extras, slot="", **attrs), inputs, {}, {})
    assert acc.shape == (*q.shape[:3], splits, v.shape[3])
    weight = torch.exp(top - top.amax(-1, keepdim=True))
    merged = (acc * weight[..., None]).sum(3) / (total * weight).sum(3, keepdim=True)
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-5)


def test_a_row_without_a_valid_key_is_zero() -> None:
    """Padding rows would be NaN, and NaN would spread through the batch."""
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    mask = torch.zeros(1, 3, dtype=torch.bool)
    attrs = {"causal": True, "window": 0, "softcap": 0.0, "scale": 1.0}
    (found,) = evaluate(
        attention_module("attention", q, k, v, {"mask": mask}, slot="", **attrs), [q, k, v, mask], {}, {}
    )
    assert torch.equal(found, torch.zeros_like(found))
    acc, _, total = evaluate(
        attention_module("attention_split", q, k, v, {"mask": mask}, splits=2, **attrs),
        [q, k, v, mask],
        {},
        {},
    )
    assert not acc.any()
    assert not total.any()


@pytest.mark.parametrize("window", [0, 2])
def test_steps_with_state_equal_one_pass(window: int) -> None:
    """Keys appended in the wrong place or slot, or queries placed at the wrong position of the context."""
    text = f"""
    symbol S [1, 8]
    symbol T [1, 8]
    func @main(%q: f32[2, 4, S, 8], %k: f32[2, 2, S, 8], %v: f32[2, 2, S, 8], %mask: bool[2, T]) -> (%b) {{
      %a = call %q, %k, %v, %mask {{callee = "f", scope = "layers.0"}} : f32[2, 4, S, 8]
      %b = call %a, %v, %k, %mask {{callee = "f", scope = "layers.1"}} : f32[2, 4, S, 8]
    }}
    func @f(%q: f32[2, 4, S, 8], %k: f32[2, 2, S, 8], %v: f32[2, 2, S, 8], %mask: bool[2, T]) -> (%a) {{
      %a = attention %q, %k, %v, %mask
        {{causal = true, extras = (mask), scale = 0.3, slot = "kv", softcap = 0.0, window = {window}}} : f32[2, 4, S, 8]
    }}"""
    module = parse_module(text)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False  # left padding
    whole_state: dict[str, Tensor] = {}
    (whole,) = evaluate(module, [q, k, v, mask], {}, {"S": 6, "T": 6}, whole_state)
    state: dict[str, Tensor] = {}
    parts, start = [], 0
    for n in (3, 1, 2):
        piece = [x[:, :, start : start + n] for x in (q, k, v)]
        start += n
        parts += evaluate(module, [*piece, mask[:, :start]], {}, {"S": n, "T": start}, state)
    assert set(state) == {f"layers.{n}.kv.{kind}" for n in (0, 1) for kind in "kv"}
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    for name, cache in whole_state.items():
        assert torch.equal(state[name], cache)


def test_a_torch_call_fills_its_template() -> None:
    """A fallback op called with the wrong tensors, or without its keywords."""
    template = '[[{"t": 1}, [0, 1]], {"dtype": {"dtype": "float64"}}]'
    found = run_op(
        "call_torch", X, Y, type=tensor_type("f64"), target="aten.sum.dim_IntList", template=template
    )
    torch.testing.assert_close(found, Y.double().sum())


def test_a_kernel_means_its_body() -> None:
    """Fusing would change what an op computes."""
    x = Value("x", tensor_type("f32", [3, 4]))
    h, y = Value("h", x.type), Value("y", tensor_type("f32", [4, 3]))
    swap = IndexMap(2, tuple(reversed(index_symbols(2))))
    body = (Op("exp", (x,), (), (h,)), Op("view", (h,), (("map", swap),), (y,)))
    kernel = Op("kernel", (x,), (("name", "k"),), (y,), body=body)
    (found,) = evaluate(Module((Function("main", (x,), (kernel,), (y,)),)), [X], {}, {})
    torch.testing.assert_close(found, X.exp().T)
