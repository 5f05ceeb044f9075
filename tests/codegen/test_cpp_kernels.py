"""Every hand-built kernel through generated C++, against float64: no further from it than eager PyTorch's dtype is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from torch import Tensor

from tests.programs import fused, planned, run_program
from tests.strategies import Case as Random
from tests.strategies import examples, modules
from tilewright.codegen.cpp.program import print_program
from tilewright.ir.index import sym
from tilewright.ir.program import Program
from tilewright.ir.reference import evaluate
from tilewright.ir.types import DType

from .cpp_run import case_of, executor_of, program_of_cases, run_case
from .triton_cases import CASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel cache for this module."""
    path = tmp_path_factory.mktemp("kernels")
    path.chmod(0o700)
    return path


def worst_excess(ours: Tensor, theirs: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """By how much an error exceeds 1.5 times eager's plus rounding; negative when it does not."""
    size = truth.abs().nan_to_num().max().item() if truth.numel() else 0.0
    allowed = 1.5 * (theirs.double() - truth).abs().max().item() + 2 * torch.finfo(dtype).eps * size
    return (ours.double() - truth).abs().max().item() - allowed


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_case(name: str, threads: int, folder: Path) -> None:
    case = case_of(name)
    found = run_case(name, folder, threads)
    plain = evaluate(case.module, case.inputs(), {}, case.dims, case.past())
    past = {slot: tensor.double() for slot, tensor in case.past().items()}
    exact = evaluate(case.module, case.inputs(), {}, case.dims, past, exact=True)
    for value, ours, theirs, truth in zip(case.kernel.results, found, plain, exact, strict=True):
        if not value.dtype.is_float:
            assert torch.equal(ours, theirs), value
            continue
        assert torch.isfinite(ours).all() or not torch.isfinite(truth).all(), value
        assert worst_excess(ours, theirs, truth, ours.dtype) <= 0, value


def test_source_is_deterministic() -> None:
    cases = {name: make() for name, make in CASES.items()}
    assert print_program(program_of_cases(cases)) == print_program(program_of_cases(cases))


@examples(4)
@given(case=modules())
def test_random_program_keeps_its_meaning(case: Random, folder: Path) -> None:
    """A random module through the whole pipeline and C++ equals the reference evaluator."""
    check_random(case, folder)


def check_random(case: Random, folder: Path) -> None:
    """Compare results and KV state of a random module with float64."""
    module = fused(case)
    # A program's results do not grow with the context; what does lies in states and masks, at their capacity.
    assume(not any(d.has(sym("T")) for v in module.main.returns for d in v.shape))

    def make(program: Program, weights: Mapping[str, Tensor]) -> object:
        return executor_of(program, weights, folder)

    found, state = run_program(case, module, planned(module), make)  # type: ignore[arg-type]
    plain_state, exact_state = dict(case.state), {k: v.double() for k, v in case.state.items()}
    plain = case.run(state=plain_state)
    exact = case.run(exact=True, state=exact_state)
    pairs = [*zip(found, plain, exact, strict=True)]
    pairs += [(state[slot], plain_state[slot], exact_state[slot]) for slot in sorted(state)]
    # Where a module mixes precisions, a result is as exact as the coarsest value that it may depend on.
    dtypes = {v.dtype for f in case.module.functions for op in f.ops for v in op.results if v.dtype.is_float}
    eps = max(torch.finfo(d.torch).eps for d in dtypes | {DType.f64})
    for ours, theirs, truth in pairs:
        if not ours.dtype.is_floating_point:
            assert torch.equal(ours, theirs)
        else:
            excess = worst_excess(ours, theirs, truth, ours.dtype)
            assert excess <= 64 * eps * (1 + truth.abs().max().item())
