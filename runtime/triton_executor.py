"""Runs a program whose kernels are generated Triton code, on CUDA tensors or on Triton's interpreter.

The generated module holds ``LAUNCH``: kernel name -> function(pointers, dims); ``STORED_DIMS``, the dims that kernels
read from memory; and perhaps ``PERSISTENT``, kernels that do the work of several at once. Memory is bound to kernels by
address, so for decode, whose tensors stay where they are, the lists of arguments are made once per request, and on a
GPU the launches are recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.ir.program import BufferKind, KernelBuildError, Program, Step

from .cuda_graph import is_recording, record
from .device import require_device
from .kernels import Kernels, Replacement
from .kv_state import RequestState
from .memory import Memory
from .step_times import NamedStep, cuda_seconds, wall_seconds

_Launcher = Callable[[str, list[Tensor], Mapping[str, int | Tensor]], None]
_RUNS_BEFORE_RECORDING = 2  # the first run compiles kernels and loads them


@dataclass
class _Bound:
    """One request's arena and the dims of its current run: ``dims`` as launchers take them, with ``stored`` among them,
    which kernels read from memory. ``counters`` are those of persistent kernels, i64[1]. For decode also the launches,
    as of a version of the request's state, and how they are run: one by one at first, then by a recording of them."""

    arena: Tensor
    stored: dict[str, Tensor]
    counters: dict[str, Tensor]
    dims: dict[str, int | Tensor] = field(default_factory=dict)
    version: int = -1
    launches: tuple[Callable[[], None], ...] = ()
    runs: int = 0
    replay: Callable[[], None] | None = None

    def set_dims(self, dims: Mapping[str, int]) -> None:
        """Make ``dims`` those of the current run, also for launches that are bound already."""
        for name, tensor in self.stored.items():
            tensor.fill_(dims[name])
        self.dims.update(dims)
        self.dims.update(self.stored)

    def bind(self, launches: tuple[Callable[[], None], ...], version: int) -> None:
        """Take new launches, made for the addresses that the state has at ``version``."""
        self.launches, self.version = launches, version
        self.runs, self.replay = 0, None

    def launch_all(self) -> None:
        for launch in self.launches:
            launch()


class TritonExecutor:
    """Runs one program; see ``runtime.executor.Executor``.

    weights: every parameter of the program, contiguous, on ``device``. path: the module that ``codegen.triton`` printed
    for the program. replacement: prints a kernel anew that does not run. Raises DeviceError where Triton cannot run,
    and KernelBuildError when the module or a weight does not fit.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor],
        path: Path,
        device: torch.device,
        replacement: Replacement | None = None,
    ) -> None:
        require_device(device)
        self.program, self.weights, self.device = program, weights, device
        self.phase = program.phase
        self.batch = program.batch if program.phase == "decode" else 0
        self._kernels = Kernels(path, replacement)
        self.refused: set[str] = set()  # persistent kernels that do not run
        for _, buffer in program.of_kind(BufferKind.param):
            if buffer.name not in weights or not weights[buffer.name].is_contiguous():
                raise KernelBuildError(f"weight {buffer.name} is missing or not contiguous")
        if missing := {s.name for s in program.kernels()} - self._kernels.names:
            raise KernelBuildError(f"{path} lacks the kernels {sorted(missing)}")
        # A decode program without PyTorch calls is a list of launches, which are bound to memory once per request.
        self._static = self.phase == "decode" and all(
            s.op.opcode == "kernel" for r in program.routines for s in r.steps
        )

    @property
    def compiled(self) -> int:
        """See ``runtime.executor.Compiling``."""
        return self._kernels.compiled

    @property
    def functions(self) -> Mapping[str, Any]:
        """The kernels that a run launches, by name, as functions under ``triton.jit``: persistent kernels where there
        are some, without those that they stand for."""
        persistent = self._kernels.persistent
        spared = {n for names in persistent.values() for n in names} if self._static else set(persistent)
        return {name: f for name, f in self._kernels.functions.items() if name not in spared}

    def run(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Compute ``outputs`` in place; see ``runtime.executor.Executor``."""
        bound = self._bound(state)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            bound.set_dims(dims)
            memory = Memory(self.program, self.weights, bound.arena, inputs, state, outputs)
            if state is None or not self._static:
                for _, run in self._steps(memory, bound.dims, dims, self._kernels.launch):
                    run()
                return
            if bound.version != state.version:
                steps = self._steps(memory, bound.dims, dims, self._kernels.launch)
                bound.bind(tuple(self._merged(steps, memory, bound)), state.version)
            self._step(bound)

    def device_step(self, state: RequestState) -> Callable[[], None] | None:
        """See ``runtime.executor.DeviceStepping``; for kernels that read T from memory, and have run before."""
        bound: _Bound | None = state.scratch.get(self)
        if (
            bound is None
            or not bound.launches
            or set(bound.stored) != {"T"}
            or bound.version != state.version
        ):
            return None
        context, launch_all = bound.stored["T"], bound.launch_all
        context.fill_(state.length)

        def step() -> None:
            context.add_(1)
            launch_all()

        return step

    def _step(self, bound: _Bound) -> None:
        """One decode step: launch by launch at first, then by a recording."""
        if bound.replay is not None:
            bound.replay()
            return
        bound.launch_all()
        bound.runs += 1
        if bound.runs == _RUNS_BEFORE_RECORDING and bound.stored and self.device.type == "cuda":
            bound.replay = record(bound.launch_all, self.device)

    def _steps(
        self,
        memory: Memory,
        dims: Mapping[str, int | Tensor],
        sizes: Mapping[str, int],
        launcher: _Launcher,
    ) -> list[NamedStep]:
        """Every step of the program, in order: its name, and a function that runs it. ``sizes`` are for PyTorch."""

        def running(step: Step, reads: tuple[int, ...], writes: tuple[int, ...]) -> Callable[[], None]:
            if step.op.opcode != "kernel":
                return partial(memory.run_torch, step, reads, writes, sizes)
            return partial(launcher, step.name, _pointers(memory, step, reads, writes), dims)

        return [(step.name, running(step, reads, writes)) for step, reads, writes in self.program.trace()]

    def _merged(self, steps: list[NamedStep], memory: Memory, bound: _Bound) -> Iterator[Callable[[], None]]:
        """The steps of a decode program, those of a persistent kernel as one."""
        groups = {names[0]: (name, names) for name, names in self._kernels.persistent.items()}
        traced = list(self.program.trace())
        n = 0
        while n < len(steps):
            name, names = groups.get(steps[n][0], ("", ()))
            stop = n + len(names)
            if not names or tuple(each for each, _ in steps[n:stop]) != names:
                yield steps[n][1]
                n += 1
                continue
            pointers = [
                p for step, reads, writes in traced[n:stop] for p in _pointers(memory, step, reads, writes)
            ]
            apart = [run for _, run in steps[n:stop]]
            yield partial(self._launch_persistent, name, [*pointers, bound.counters[name]], bound.dims, apart)
            n = stop

    def _launch_persistent(
        self,
        name: str,
        pointers: list[Tensor],
        dims: Mapping[str, int | Tensor],
        apart: Sequence[Callable[[], None]],
    ) -> None:
        """Launch a persistent kernel; where it does not run, now and later, the kernels that it stands for."""
        if name not in self.refused:
            try:
                self._kernels.try_launch(name, pointers, dims)
            except KernelBuildError as error:
                if is_recording():
                    raise
                self.refused.add(name)
                warnings.warn(f"{error}; its kernels are launched one by one", stacklevel=2)
            else:
                return
        for launch in apart:
            launch()

    def step_seconds(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> list[float]:
        """Run step by step. Gives the seconds of each step of ``program.trace()``; infinity, and a warning that names
        it, for a kernel that cannot be compiled or launched."""
        bound = self._bound(state)
        memory = Memory(self.program, self.weights, bound.arena, inputs, state, outputs)
        bound.set_dims(dims)
        steps = self._steps(memory, bound.dims, dims, self._kernels.try_launch)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                return cuda_seconds(steps)
        return wall_seconds(steps)

    def _bound(self, state: RequestState | None) -> _Bound:
        if state is not None and self in state.scratch:
            found: _Bound = state.scratch[self]
            return found
        with torch.inference_mode(False):
            stored = {
                name: torch.zeros(1, dtype=torch.int32, device=self.device)
                for name in self._kernels.stored_dims
            }
            counters = {
                name: torch.zeros(1, dtype=torch.int64, device=self.device)
                for name in self._kernels.persistent
            }
            arena = torch.empty(self.program.arena_bytes, dtype=torch.uint8, device=self.device)
        bound = _Bound(arena, stored, counters)
        if state is not None:
            state.scratch[self] = bound
        return bound


def _pointers(memory: Memory, step: Step, reads: tuple[int, ...], writes: tuple[int, ...]) -> list[Tensor]:
    """A kernel's tensor arguments; only their addresses and element types count."""
    values = (*step.op.operands, *step.op.results)
    return [memory.pointer(n, v) for n, v in zip((*reads, *writes), values, strict=True)]
