"""Orders of pairs by expert and products of their blocks, beside plain loops; and what the verifier says of misuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import examples
from tilewright.ir.builder import Builder
from tilewright.ir.errors import VerifyError
from tilewright.ir.module import Function, Module
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.reference import evaluate
from tilewright.ir.types import tensor_type
from tilewright.ir.verify import verify_module

DEPTH, COLUMNS, CHOSEN = 3, 5, 2


def both(tokens: int, experts: int, block: int, transposed: bool = False, bias: bool = False) -> Module:
    """Orders ids[B, 2], multiplies a row per token and then, with the other matrices, a row per pair."""
    b = Builder()
    attrs: dict[str, Any] = {"block": block, "transposed": transposed or None}
    matrix = [DEPTH, COLUMNS] if transposed else [COLUMNS, DEPTH]
    x, ids = (
        b.param_value("x", tensor_type("f32", ["B", DEPTH])),
        b.param_value("ids", tensor_type("i64", ["B", CHOSEN])),
    )
    up = b.param_value("up", tensor_type("f32", [experts, *matrix]))
    down = b.param_value("down", tensor_type("f32", [experts, *matrix[::-1]]))
    extra = [b.param_value("bias", tensor_type("f32", [experts, COLUMNS]))] if bias else []
    order = b.add_multi("experts_order", ids, experts=experts, block=block)
    hidden = b.add("grouped_matmul", x, *order, up, *extra, **attrs, divisor=CHOSEN)
    out = b.add("grouped_matmul", hidden, *order, down, **attrs)
    function = Function("main", tuple(b.params), tuple(b.ops), (*order, hidden, out))
    return Module((function,), (("B", 1, tokens),))


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """ids [B, 2], the number of experts, rows of a block. Some experts are chosen by nobody, or by all."""
    experts, block = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    few = draw(st.sets(st.integers(0, experts - 1), min_size=1))
    row = st.lists(st.sampled_from(sorted(few)), min_size=CHOSEN, max_size=CHOSEN)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=12))), experts, block


@examples(80)
@given(choices())
def test_order(case: tuple[Tensor, int, int]) -> None:
    """Each pair once, by expert and else as they came; a block's pairs have one expert; nobody at a run's end only."""
    ids, experts, block = case
    module = both(len(ids), experts, block)
    inputs = drawn(module, ids)
    order, block_expert, *_ = evaluate(module, inputs, {}, {"B": len(ids)})
    flat = ids.flatten().tolist()
    named = [p for p in order.tolist() if p != len(flat)]
    assert named == sorted(range(len(flat)), key=lambda p: flat[p])
    for rows, expert in zip(order.view(-1, block).tolist(), block_expert.tolist(), strict=True):
        known = [p for p in rows if p != len(flat)]
        assert {flat[p] for p in known} == ({expert} if expert < experts else set())
        assert rows == known + [len(flat)] * (block - len(known))
    used = -(-torch.bincount(ids.flatten(), minlength=experts) // block)
    assert torch.bincount(block_expert, minlength=experts)[:experts].tolist() == used.tolist()


@examples(80)
@given(choices(), st.booleans(), st.booleans())
def test_product(case: tuple[Tensor, int, int], transposed: bool, bias: bool) -> None:
    """Each row with the matrix of its expert, one by one."""
    ids, experts, block = case
    module = both(len(ids), experts, block, transposed, bias)
    inputs = drawn(module, ids)
    *_, hidden, out = evaluate(module, inputs, {}, {"B": len(ids)}, exact=True)
    up, down = (inputs[n].double().mT if transposed else inputs[n].double() for n in ("up", "down"))
    for pair, expert in enumerate(ids.flatten().tolist()):
        row = up[expert] @ inputs["x"][pair // CHOSEN].double()
        row = row + inputs["bias"][expert] if bias else row
        torch.testing.assert_close(hidden[pair], row, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out[pair], down[expert] @ row, rtol=1e-12, atol=1e-12)


def drawn(module: Module, ids: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = {"ids": ids}
    for p in module.main.params:
        shape = [len(ids) if d.free_symbols else int(d) for d in p.shape]
        found.setdefault(p.name, torch.randn(shape, generator=generator))
    return found


@pytest.mark.parametrize("block", [1, 4, 16])
def test_text_reads_back(block: int) -> None:
    module = both(9, 3, block, transposed=True, bias=True)
    verify_module(module)
    assert parse_module(print_module(module)) == module


ORDER = {"order": ("i32", ["4*((2*B + 9) // 4)"]), "block_expert": ("i32", ["(2*B + 9) // 4"])}
PLAIN = {"x": ("f32", ["B", 8]), **ORDER, "w": ("f32", [3, 5, 8]), "bias": ("f32", [3, 5])}
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rank": ({"x": ("f32", ["B", 1, 8])}, {}, "x needs rank 2"),
    "K": ({"x": ("f32", ["B", 7])}, {}, "K differs"),
    "layout": ({}, {"transposed": True}, "K differs"),
    "float64": ({"x": ("f64", ["B", 8])}, {}, "no form in f64"),
    "dtype": ({"w": ("bf16", [3, 5, 8])}, {}, "weights must be f32"),
    "bias": ({"bias": ("f32", [5])}, {}, "the bias must be"),
    "order of other rows": ({}, {"divisor": 1}, "order must be"),
    "another block": ({}, {"block": 8}, "order must be"),
    "other experts": ({"w": ("f32", [4, 5, 8]), "bias": ("f32", [4, 5])}, {}, "order must be"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("types", "attrs", "message"), BROKEN.values(), ids=[k.replace(" ", "-") for k in BROKEN]
)
def test_misuse_of_a_product_is_named(types: dict[str, Any], attrs: dict[str, Any], message: str) -> None:
    """An order of other sizes would read and write beyond the ends of rows."""
    b = Builder()
    given = [b.param_value(n, tensor_type(*t)) for n, t in (PLAIN | types).items()]
    with pytest.raises(VerifyError, match=re.escape(message)):
        b.add("grouped_matmul", *given, **{"block": 4, "divisor": 2, **attrs})


@pytest.mark.parametrize(
    ("dtype", "attrs", "message"),
    [
        ("f32", {}, "ids must be integer"),
        ("i64", {"block": 0}, "positive"),
        ("i64", {"experts": 0}, "positive"),
    ],
)
def test_misuse_of_an_order_is_named(dtype: str, attrs: dict[str, int], message: str) -> None:
    b = Builder()
    with pytest.raises(VerifyError, match=message):
        b.add_multi(
            "experts_order",
            b.param_value("ids", tensor_type(dtype, ["B", 2])),
            **{"experts": 3, "block": 4, **attrs},
        )
