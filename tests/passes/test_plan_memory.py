"""Memory plans of random fused modules: they pass the checker, they run, and they are worth their while."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.programs import fused, planned, run_program
from tests.strategies import Case, examples, modules
from tilewright.ir.check_plan import check_plan
from tilewright.ir.program import BufferKind, Program
from tilewright.ir.types import DType
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes
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


@examples(40)
@given(modules())
def test_the_arena_is_no_larger_than_all_values_together(case: Case) -> None:
    """A planner that reuses nothing would pass every check of overlap."""
    program = planned(run_passes(case.module, PassOptions()))
    written = {n for _, _, writes in program.trace() for n in writes}
    arena = dict(program.of_kind(BufferKind.arena))
    assert program.arena_bytes <= sum(b.nbytes for b in arena.values())
    assert set(arena) <= written
