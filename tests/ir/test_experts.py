"""What experts mean, beside a plain loop over tokens, and what the verifier says of those that mean nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.experts_cases import CASES, ExpertsCase
from tilewright.ir.builder import Builder
from tilewright.ir.errors import VerifyError
from tilewright.ir.module import Function, Module
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.reference import evaluate
from tilewright.ir.types import TensorType, concrete, tensor_type
from tilewright.ir.verify import verify_module
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes

ACTIVATIONS = {
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU("tanh"),
    "relu": torch.nn.ReLU(),
}


def one_by_one(case: ExpertsCase, given: dict[str, Tensor]) -> Tensor:
    """The sum over chosen experts of each token by itself, in float64."""
    values = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
    up, down, attrs = values["gate_up"], values["down"], case.attrs
    if attrs.get("transposed"):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    limit, alpha = attrs.get("limit", float("inf")), attrs.get("alpha", 1.0)
    act = ACTIVATIONS.get(attrs.get("activation", "silu"), lambda g: g / (1 + torch.exp(-alpha * g)))
    rows = []
    for token in range(case.tokens):
        row = torch.zeros(case.depth, dtype=torch.float64)
        for place in range(case.chosen):
            e = int(values["ids"][token, place])
            both = up[e] @ values["x"][token]
            both = both + values["gate_up_bias"][e] if "gate_up_bias" in values else both
            pairs = both.view(-1, 2).T if attrs.get("interleaved") else both.view(2, -1)
            hidden = act(pairs[0].clamp(max=limit)) * (
                pairs[1].clamp(-limit, limit) + attrs.get("offset", 0.0)
            )
            out = down[e] @ hidden
            out = out + values["down_bias"][e] if "down_bias" in values else out
            row += values["scores"][token, place] * out
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_meaning(name: str) -> None:
    case = CASES[name]
    (found,) = evaluate(case.module(), case.inputs(), {}, {"B": case.tokens}, exact=True)
    torch.testing.assert_close(found, one_by_one(case, case.inputs()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_spelled_out_it_means_the_same(name: str) -> None:
    """And no kernel stores the weights that were looked up."""
    case = CASES[name]
    module = run_passes(case.module(), PassOptions(spell_out_experts=True))
    dims = {"B": case.tokens}
    assert not any(op.opcode == "experts" for k in module.main.ops for op in k.body)
    largest = max(concrete((v.type.numel,), dims)[0] for op in module.main.ops for v in op.results)
    assert largest <= case.tokens * case.chosen * max(2 * case.inner, case.depth)
    (found,), (expected,) = (
        evaluate(m, case.inputs(), {}, dims, exact=True) for m in (module, case.module())
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_text_reads_back(name: str) -> None:
    module = CASES[name].module()
    verify_module(module)
    assert parse_module(print_module(module)) == module


def test_tokens_may_have_more_dims() -> None:
    case = CASES["odd sizes"]
    b, given = Builder(), case.inputs()
    lead = {"x", "ids", "scores"}
    types = {n: TensorType(t.dtype, (1, *t.shape) if n in lead else t.shape) for n, t in case.types().items()}
    b.add(
        "experts",
        *(b.param_value(n, tensor_type(t.dtype, t.shape)) for n, t in types.items()),
        activation="silu",
    )
    module = Module(
        (Function("main", tuple(b.params), tuple(b.ops), b.ops[-1].results),), (("B", 1, case.tokens),)
    )
    (found,) = evaluate(
        module, {n: x[None] if n in lead else x for n, x in given.items()}, {}, {"B": case.tokens}
    )
    (expected,) = evaluate(case.module(), given, {}, {"B": case.tokens})
    assert torch.equal(found[0], expected)


PLAIN = ExpertsCase(3, 2, 4, 8, 6)
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown activation": ({}, {"activation": "tanh"}, "unknown activation 'tanh'"),
    "alpha of another activation": ({}, {"activation": "relu", "alpha": 2.0}, "alpha belongs to silu"),
    "negative limit": ({}, {"limit": -1.0}, "limit must not be negative"),
    "order of extras": ({}, {"extras": ("down_bias", "gate_up_bias")}, "in order"),
    "no extras": ({}, {"extras": ()}, "left out"),
    "ids of floats": ({"ids": ("f32", ["B", 2])}, {}, "ids must be integer"),
    "scores of integers": ({"scores": ("i64", ["B", 2])}, {}, "scores must be float"),
    "other scores": ({"scores": ("f32", ["B", 3])}, {}, "do not fit"),
    "x of f8": ({"x": ("f8", ["B", 8])}, {}, "cannot compute in f8"),
    "rank of weights": ({"gate_up": ("f32", [12, 8])}, {}, "weights need rank 3"),
    "K": ({"gate_up": ("f32", [4, 12, 9])}, {}, "K differs"),
    "I": ({"gate_up": ("f32", [4, 10, 8])}, {}, "twice the 6"),
    "number of experts": ({"down": ("f32", [3, 8, 6])}, {}, "weights differ"),
    "dtype of weights": ({"down": ("bf16", [4, 8, 6])}, {}, "weights must be f32"),
    "layout": ({}, {"transposed": True}, "twice the 8"),
    "bias": ({"down_bias": ("f32", [4, 6])}, {"extras": ("down_bias",)}, "down_bias must be"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("types", "attrs", "message"), BROKEN.values(), ids=[k.replace(" ", "-") for k in BROKEN]
)
def test_misuse_is_named(types: dict[str, Any], attrs: dict[str, Any], message: str) -> None:
    """Sizes that do not fit would read beyond a weight's end."""
    b = Builder()
    case = replace(PLAIN, attrs={k: v for k, v in attrs.items() if k == "extras"})
    given = case.types() | {name: tensor_type(*t) for name, t in types.items()}
    with pytest.raises(VerifyError, match=re.escape(message)):
        b.add("experts", *(b.param_value(n, t) for n, t in given.items()), **{"activation": "silu", **attrs})
