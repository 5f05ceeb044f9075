"""A random module through the whole pipeline and a backend, compared with float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from hypothesis import assume
from torch import Tensor

from tests.programs import fused, planned, run_program
from tests.strategies import Case
from tilewright.ir.index import sym
from tilewright.ir.program import Program
from tilewright.ir.types import DType
from tilewright.runtime.executor import Executor


def worst_excess(ours: Tensor, theirs: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """By how much an error exceeds 1.5 times eager's plus rounding; negative when it does not."""
    size = truth.abs().nan_to_num().max().item() if truth.numel() else 0.0
    allowed = 1.5 * (theirs.double() - truth).abs().max().item() + 2 * torch.finfo(dtype).eps * size
    return (ours.double() - truth).abs().max().item() - allowed


def check_random(
    case: Case, make: Callable[[Program, Mapping[str, Tensor]], Executor], splits: int = 0
) -> None:
    """Compare results and KV state of a random module, run by ``make(program, weights)``, with float64."""
    module = fused(case, splits)
    # A program's results do not grow with the context; what does lies in states and masks, at their capacity.
    assume(not any(d.has(sym("T")) for v in module.main.returns for d in v.shape))
    found, state = run_program(case, module, planned(module), make)
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
