"""Random cases as programs: fused, planned, and run by any executor.

program = planned(case, splits=2)
outputs, state = run_program(case, program, ReferenceExecutor(program, weights_for(case, ...)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.strategies import Case, prepared_weights
from tilewright.ir.index import sym
from tilewright.ir.module import Module
from tilewright.ir.program import BufferKind, Program, concrete, physical_shape
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes
from tilewright.passes.plan_memory import plan_memory
from tilewright.runtime.executor import Executor

CAPACITY = 16
"""The length that KV states and masks are laid out for; the largest T of random cases."""


@dataclass(eq=False)
class KVState:
    """As much of a request's state as an executor reads."""

    buffers: dict[str, Tensor]
    version: int = 0
    scratch: dict[Any, Any] = field(default_factory=dict)


def fused(case: Case, splits: int = 0) -> Module:
    """The case after the whole pipeline: a decode program's module when S is 1, else a prefill program's."""
    decode = case.dims["S"] == 1
    fixed = case.fixed if decode else ()
    return run_passes(case.module, PassOptions(fixed=fixed, splits=splits if decode else 0))


def planned(module: Module, name: str = "forward") -> Program:
    return plan_memory(module, name, "forward", batch=0, capacity=CAPACITY)


def run_program(
    case: Case, module: Module, program: Program, make: Callable[[Program, Mapping[str, Tensor]], Executor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run ``planned(module)`` by the executor that ``make(program, weights)`` gives.

    Results in the order of the entry's returns, and the KV state up to the new length. What is not written stays NaN.
    """
    weights = case.weights | prepared_weights(module, case.weights, case.dims)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    executor = make(program, weights)
    inputs = {}
    for _, b in program.of_kind(BufferKind.input):
        given = case.inputs[b.name]
        inputs[b.name] = _empty(physical_shape(b.type, CAPACITY), b.type.dtype.torch, case.dims)
        inputs[b.name][tuple(slice(0, n) for n in given.shape)] = given
    outputs = {
        b.name: _empty(b.type.shape, b.type.dtype.torch, case.dims)
        for _, b in program.of_kind(BufferKind.output)
    }
    state = KVState({})
    for _, b in program.of_kind(BufferKind.state):
        state.buffers[b.name] = _empty(physical_shape(b.type, CAPACITY), b.type.dtype.torch, case.dims)
        if sym("T") not in b.type.shape:
            state.buffers[b.name].zero_()  # of a recurrent layer at the start of a request
        if (past := case.state.get(b.name)) is not None:
            state.buffers[b.name][tuple(slice(0, n) for n in past.shape)] = past
    executor.run(inputs, case.dims, state, outputs)  # type: ignore[arg-type]
    return [outputs[f"output{n}"] for n in range(len(outputs))], {
        b.name: state.buffers[b.name][tuple(slice(0, n) for n in concrete(b.type.shape, case.dims))]
        for _, b in program.of_kind(BufferKind.state)
    }


def _empty(shape: tuple[Any, ...], dtype: torch.dtype, dims: Mapping[str, int]) -> Tensor:
    """Memory that shows when it is read before it is written."""
    sizes = concrete(shape, dims)
    if dtype.is_floating_point:
        return torch.full(sizes, torch.nan, dtype=dtype)
    return torch.ones(sizes, dtype=dtype) if dtype is torch.bool else torch.full(sizes, 99, dtype=dtype)


def has_state(module: Module) -> bool:
    """True when the module's types mention the context length."""
    return sym("T") in {s for v in module.main.params for d in v.shape for s in d.free_symbols}
