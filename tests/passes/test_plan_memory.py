"""Memory plans of random fused modules: they pass the checker, they run, and they are worth their while."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.programs import CAPACITY, fused, planned, run_program
from tests.strategies import Case, examples, modules
from tilewright.ir.check_plan import check_plan
from tilewright.ir.parser import parse_module
from tilewright.ir.program import BufferKind, Program
from tilewright.ir.types import DType
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes
from tilewright.passes.plan_memory import plan_memory
from tilewright.reference_executor import ReferenceExecutor
from tilewright.runtime.executor import Executor


def reference(program: Program, weights: Mapping[str, Tensor]) -> Executor:
    return ReferenceExecutor(program, weights)


@examples(50)
@given(modules(dtypes=(DType.f32,)), st.integers(0, 2))
def test_running_in_the_planned_arena_gives_the_result(case: Case, splits: int) -> None:
    """A value overwritten while it is needed, a weight of another layer, an output that nothing writes."""
    module = fused(case, splits)
    program = planned(module)
    results, state = run_program(case, module, program, reference)
    past = dict(case.state)
    expected = case.run(state=past)
    assert len(results) == len(expected)
    for n, (found, right) in enumerate(zip(results, expected, strict=True)):
        size = float(right.double().abs().max()) if right.numel() else 1.0
        text = f"\n{module}\n{program}"
        torch.testing.assert_close(
            found,
            right,
            rtol=1e-3,
            atol=1e-3 * max(size, 1),
            msg=lambda m, n=n, t=text: f"result {n}: {m}{t}",
        )
    assert state.keys() == past.keys()
    for name, found in state.items():
        torch.testing.assert_close(found, past[name], rtol=1e-3, atol=1e-3)


@examples(40)
@given(modules())
def test_random_plans_never_overlap(case: Case) -> None:
    """Two live buffers in one place."""
    program = planned(run_passes(case.module, PassOptions()))
    check_plan(program)
    for _, buffer in program.of_kind(BufferKind.arena):
        assert buffer.nbytes > 0
        assert buffer.offset % 64 == 0


def test_sizes_that_occur_together_share_the_arena_of_one_of_them() -> None:
    """Many short rows, or few long ones: not many long ones."""
    module = parse_module(
        "entry @main\nsymbol B [1, 64]\nsymbol S [1, 8]\n"
        "func @main(%x: f32[B, S, 4], %w: f32[4, 4]) -> (%z) {\n"
        "  %y = matmul %x, %w : f32[B, S, 4]\n  %z = matmul %y, %w : f32[B, S, 4]\n}"
    )
    fused = run_passes(module, PassOptions())
    free = plan_memory(fused, "forward", "forward", 0, CAPACITY)
    bound = plan_memory(fused, "forward", "forward", 0, CAPACITY, [{"B": 8, "S": 8}, {"B": 64, "S": 1}])
    assert free.largest == ({"B": 64, "S": 8},)
    assert (free.arena_bytes, bound.arena_bytes) == (64 * 8 * 4 * 4, 64 * 4 * 4)
    assert "together at most B 8 S 8 or B 64 S 1" in str(bound)


@examples(40)
@given(modules())
def test_the_arena_is_no_larger_than_all_values_together(case: Case) -> None:
    """A planner that reuses nothing would pass every check of overlap."""
    program = planned(run_passes(case.module, PassOptions()))
    written = {n for _, _, writes in program.trace() for n in writes}
    arena = dict(program.of_kind(BufferKind.arena))
    assert program.arena_bytes <= sum(b.nbytes for b in arena.values())
    assert set(arena) <= written


def test_a_layer_may_be_given_a_weight_of_the_whole_model() -> None:
    """Folded before the layers, as DeBERTa's table of distances is: the same buffer for all of them."""
    module = parse_module(
        "entry @main\nsymbol B [1, 4]\n"
        "func @main(%x: f32[B, 4]) -> (%z) {\n"
        '  %w = param {name = "w"} : f32[4, 4]\n'
        '  %y = call %x, %w {callee = "layer", scope = "a"} : f32[B, 4]\n'
        '  %z = call %y, %w {callee = "layer", scope = "b"} : f32[B, 4]\n}\n'
        "func @layer(%x: f32[B, 4], %w: f32[4, 4]) -> (%y) {\n  %y = matmul %x, %w : f32[B, 4]\n}"
    )
    program = plan_memory(run_passes(module, PassOptions()), "forward", "forward", 0, CAPACITY)
    check_plan(program)
    assert [b.name for _, b in program.of_kind(BufferKind.param)] == ["w"]
    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    executor = reference(program, {"w": weight})
    outputs = {"output0": torch.empty(3, 4)}
    executor.run({"x": x}, {"B": 3}, None, outputs)
    torch.testing.assert_close(outputs["output0"], x @ weight.T @ weight.T)
