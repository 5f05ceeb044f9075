"""Runs a program whose kernels are a shared library: one call into it per step, or per run of kernels between the
steps that PyTorch does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tilewright.ir.program import STEPS, BufferKind, KernelBuildError, Program, Step

from .kv_state import RequestState
from .memory import Memory
from .native import NativeLibrary, PointerTable, Tuning, pointer_table
from .openmp import torch_openmp

_EMPTY_RUNS = 20  # the least of so many is what a call costs


@dataclass
class _Bound:
    """One request's arena, scratch memory and table of addresses; ``version`` is the state's that the table is for."""

    arena: Tensor
    workspace: Tensor
    table: PointerTable
    version: int = -1


@dataclass(frozen=True)
class _Range:
    """Kernels ``first <= n < last``, then (but for the last range) a step that PyTorch runs."""

    first: int
    last: int
    torch_step: tuple[Step, tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class _Steps:
    """One run: its memory, and ``kernels(first, last)``, which runs the kernels among those steps."""

    memory: Memory
    kernels: Callable[[int, int], None]


class NativeExecutor:
    """Runs one program; see ``runtime.executor.Executor``. Uses as many threads as PyTorch does at that time, or fewer
    where ``tuning``, which may be set between runs, says that fewer are faster.

    weights: every parameter of the program, contiguous. Raises KernelBuildError when one does not fit.
    """

    def __init__(self, program: Program, weights: Mapping[str, Tensor], library: NativeLibrary) -> None:
        self.program, self.weights, self.library = program, weights, library
        self.tuning = Tuning()
        self.phase = program.phase
        self.batch = program.batch if program.phase == "decode" else 0
        for _, buffer in program.of_kind(BufferKind.param):
            if buffer.name not in weights or not weights[buffer.name].is_contiguous():
                raise KernelBuildError(f"weight {buffer.name} is missing or not contiguous")
        self._ranges = _ranges(program)
        # Where PyTorch computes in between, a convolution or the choice of a token, its threads go on spinning. Else
        # the library's own are better: on a busy machine they make way for others while they wait.
        self._takes_turns = program.phase in STEPS or len(self._ranges) > 1
        self._symbols = tuple(name for name, _, _ in program.symbols)
        self._varying = tuple(
            (n, b) for n, b in enumerate(program.buffers) if b.kind in (BufferKind.input, BufferKind.output)
        )

    def run(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Compute ``outputs`` in place; see ``runtime.executor.Executor``."""
        steps = self._bind(inputs, dims, state, outputs)
        for part in self._ranges:
            if part.first < part.last:
                steps.kernels(part.first, part.last)
            if part.torch_step is not None:
                steps.memory.run_torch(*part.torch_step, dims)

    def step_seconds(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
        clock: Callable[[], float] = time.perf_counter,
    ) -> list[float]:
        """Run step by step. Gives the seconds that each step of ``program.trace()`` took by ``clock``, less those of
        calling the library for nothing."""
        steps = self._bind(inputs, dims, state, outputs)
        empty = min(_seconds(clock, lambda: steps.kernels(0, 0)) for _ in range(_EMPTY_RUNS))
        taken = []
        for n, (step, reads, writes) in enumerate(self.program.trace()):
            if step.op.opcode == "kernel":
                taken.append(max(0.0, _seconds(clock, partial(steps.kernels, n, n + 1)) - empty))
            else:
                taken.append(_seconds(clock, partial(steps.memory.run_torch, step, reads, writes, dims)))
        return taken

    def _bind(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> _Steps:
        tuning = self.tuning
        threads = min(torch.get_num_threads(), tuning.threads or torch.get_num_threads())
        sizes = self.library.dims([dims[name] for name in self._symbols])
        bound = self._bound(state)
        memory = Memory(self.program, self.weights, bound.arena, inputs, state, outputs)
        if state is None or bound.version != state.version:
            for n, buffer in enumerate(self.program.buffers):
                bound.table[n] = memory.address(buffer)
            bound.version = state.version if state is not None else -1
        elif self.phase != "decode":
            for n, buffer in self._varying:
                bound.table[n] = memory.address(buffer)
        needed = self.library.workspace_bytes(sizes, threads)
        if needed > bound.workspace.numel():
            bound.workspace = torch.empty(needed, dtype=torch.uint8)
        scratch = bound.workspace.data_ptr()

        def kernels(first: int, last: int) -> None:
            self.library.run(
                bound.table, sizes, scratch, threads, tuning.prefetch_bytes, first, last,
                torch_openmp() if self._takes_turns else None,
            )  # fmt: skip

        return _Steps(memory, kernels)

    def _bound(self, state: RequestState | None) -> _Bound:
        if state is not None and self in state.scratch:
            found: _Bound = state.scratch[self]
            return found
        with torch.inference_mode(False):
            arena = torch.empty(self.program.arena_bytes, dtype=torch.uint8)
            bound = _Bound(arena, arena[:0], pointer_table([0] * len(self.program.buffers)))
        if state is not None:
            state.scratch[self] = bound
        return bound


def _ranges(program: Program) -> tuple[_Range, ...]:
    """The program cut at the steps that PyTorch runs, which count in the numbering too."""
    ranges: list[_Range] = []
    first = number = 0
    for number, (step, reads, writes) in enumerate(program.trace()):
        if step.op.opcode == "call_torch":
            ranges.append(_Range(first, number, (step, reads, writes)))
            first = number + 1
    return (*ranges, _Range(first, number + 1))


def _seconds(clock: Callable[[], float], run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start
