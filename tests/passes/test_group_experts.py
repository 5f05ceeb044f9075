"""Experts whose tokens are grouped mean what they meant, whatever was chosen and however large a block is."""

from __future__ import annotations

import pytest
import torch

from tests.experts_cases import CASES, ExpertsCase
from tilewright.ir.module import Module, walk
from tilewright.ir.reference import evaluate
from tilewright.ir.types import DType, concrete
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes


def opcodes(module: Module) -> list[str]:
    return [op.opcode for f in module.functions for op in walk(f.ops)]


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("name", CASES)
def test_grouped_it_means_the_same(name: str, block: int) -> None:
    """And no kernel stores weights, or a row that is nobody's."""
    case = CASES[name]
    module = run_passes(case.module(), PassOptions(group_experts=block, spell_out_experts=True))
    dims, found = {"B": case.tokens}, opcodes(module)
    assert (found.count("experts"), found.count("experts_order"), found.count("grouped_matmul")) == (0, 1, 2)
    floats = [v for op in module.main.ops for v in op.results if v.dtype.is_float]
    largest = max(concrete((v.type.numel,), dims)[0] for v in floats)
    assert largest <= case.tokens * case.chosen * max(2 * case.inner, case.depth)
    (ours,), (expected,) = (evaluate(m, case.inputs(), {}, dims, exact=True) for m in (module, case.module()))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_grouped_experts_are_five_kernels() -> None:
    """Order and products by themselves; the gate, and the weighted sum."""
    module = run_passes(CASES["many tokens"].module(), PassOptions(group_experts=16))
    assert [op.body[0].opcode for op in module.main.ops if len(op.body) == 1] == [
        "experts_order", "grouped_matmul", "grouped_matmul",
    ]  # fmt: skip
    assert len(module.main.ops) == 5


@pytest.mark.parametrize(
    ("tokens", "chosen", "experts", "block"), [(512, 2, 8, 128), (512, 8, 128, 64), (2, 1, 4, 16)]
)
def test_a_block_has_room_for_what_most_experts_get(
    tokens: int, chosen: int, experts: int, block: int
) -> None:
    """Smaller ones read weights again and again; larger ones multiply rows of nobody."""
    case = ExpertsCase(tokens, chosen, experts, 32, 16)
    module = run_passes(case.module(), PassOptions(group_experts=128))
    (order,) = (op for op in walk(module.main.ops) if op.opcode == "experts_order")
    assert order.attr("block") == block


def test_float64_is_not_grouped() -> None:
    case = CASES["odd sizes"]
    wide = type(case)(**{**case.__dict__, "dtype": DType.f64})
    found = opcodes(run_passes(wide.module(), PassOptions(group_experts=16)))
    assert "grouped_matmul" not in found
    assert "experts" not in found
