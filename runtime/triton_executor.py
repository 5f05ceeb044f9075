"""Runs a program whose kernels are generated Triton code, on CUDA tensors or on Triton's interpreter.

The generated module holds ``LAUNCH``: kernel name -> function(pointers, dims), and ``STORED_DIMS``, the dims that
kernels read from memory. Nothing else of it matters here. Memory is bound to kernels by address, so for decode, whose
tensors stay where they are, the lists of arguments are made once per request, and on a GPU the launches are recorded.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from tilewright.ir.program import BufferKind, CacheError, DeviceError, KernelBuildError, Program, Step

from .cuda_graph import record
from .files import require_private, write_atomically
from .kv_state import RequestState
from .memory import Memory

Launch = Callable[[list[Tensor], Mapping[str, int | Tensor]], None]
_RUNS_BEFORE_RECORDING = 2  # the first run compiles kernels and loads them


def is_interpreting() -> bool:
    """True when this process runs Triton kernels on the CPU, step by step (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def require_device(device: torch.device) -> None:
    """Raise DeviceError unless Triton kernels can run on tensors of ``device``."""
    if device.type == "cuda":
        return
    if not is_interpreting():
        raise DeviceError(
            f"the triton backend needs a CUDA device, not {device}; move the model there, choose backend='cpp', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels slowly on the CPU"
        )


def write_module(folder: Path, text: str) -> Path:
    """The path of a file that holds exactly ``text``, to be imported: in ``folder``, or, with a warning, in a private
    temporary one where that cannot be written, or is not the user's alone.

    The name follows from the content; a file that was damaged is replaced, and none is ever seen half-written.
    """
    name = f"kernels_{hashlib.sha256(text.encode()).hexdigest()[:24]}.py"
    try:
        return _write(folder / name, text)
    except (OSError, CacheError) as error:
        warnings.warn(
            f"generated kernels are not kept: {error}; fix the folder, or set TILEWRIGHT_CACHE to another one",
            stacklevel=2,
        )
        # Triton reads a kernel's source from its file, so there must be one somewhere.
        return _write(_private_folder() / name, text)


@lru_cache(maxsize=1)
def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tilewright-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _write(path: Path, text: str) -> Path:
    """Raises OSError, or CacheError when somebody else could change what is going to be imported."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    require_private(path.parent)
    if path.is_file() and path.read_bytes() == text.encode():
        require_private(path)
    else:
        write_atomically(path, text)
    return path


@dataclass(frozen=True)
class Launchers:
    """What a generated module holds: a function per kernel, and the dims that kernels read from memory."""

    of: Mapping[str, Launch]
    stored_dims: tuple[str, ...]


def load_launchers(path: Path) -> Launchers:
    """Import a generated module. Raises KernelBuildError when it is none."""
    spec = importlib.util.spec_from_file_location(f"tilewright_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise KernelBuildError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return Launchers(module.LAUNCH, module.STORED_DIMS)
    except Exception as error:
        raise KernelBuildError(f"generated Triton module {path} cannot be loaded: {error}") from error


@dataclass
class _Bound:
    """One request's arena and the dims of its current run: ``dims`` as launchers take them, with ``stored`` among them,
    which kernels read from memory. For decode also the launches, as of a version of the request's state, and how they
    are run: one by one at first, then by a recording of them."""

    arena: Tensor
    stored: dict[str, Tensor]
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
    for the program. Raises DeviceError where Triton cannot run, and KernelBuildError when the module or a weight does
    not fit.
    """

    def __init__(
        self, program: Program, weights: Mapping[str, Tensor], path: Path, device: torch.device
    ) -> None:
        require_device(device)
        self.program, self.weights, self.device = program, weights, device
        self.phase = program.phase
        self.batch = program.batch if program.phase == "decode" else 0
        self._launchers = load_launchers(path)
        for _, buffer in program.of_kind(BufferKind.param):
            if buffer.name not in weights or not weights[buffer.name].is_contiguous():
                raise KernelBuildError(f"weight {buffer.name} is missing or not contiguous")
        if missing := {s.name for s in program.kernels()} - set(self._launchers.of):
            raise KernelBuildError(f"{path} lacks the kernels {sorted(missing)}")
        # A decode program without PyTorch calls is a list of launches, which are bound to memory once per request.
        self._static = self.phase == "decode" and all(
            s.op.opcode == "kernel" for r in program.routines for s in r.steps
        )

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
                for _, run in self._steps(memory, bound.dims, dims):
                    run()
                return
            if bound.version != state.version:
                bound.bind(tuple(run for _, run in self._steps(memory, bound.dims, dims)), state.version)
            self._step(bound)

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
        self, memory: Memory, dims: Mapping[str, int | Tensor], sizes: Mapping[str, int]
    ) -> list[tuple[str, Callable[[], None]]]:
        """Every step of the program, in order: its name, and a function that runs it. ``sizes`` are for PyTorch."""

        def running(step: Step, reads: tuple[int, ...], writes: tuple[int, ...]) -> Callable[[], None]:
            if step.op.opcode != "kernel":
                return partial(memory.run_torch, step, reads, writes, sizes)
            return partial(self._launchers.of[step.name], _pointers(memory, step, reads, writes), dims)

        return [(step.name, running(step, reads, writes)) for step, reads, writes in self.program.trace()]

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
        steps = self._steps(memory, bound.dims, dims)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                return _cuda_seconds(steps)
        refused: set[str] = set()
        return [_wall_seconds(name, run, refused) for name, run in steps]

    def _bound(self, state: RequestState | None) -> _Bound:
        if state is not None and self in state.scratch:
            found: _Bound = state.scratch[self]
            return found
        with torch.inference_mode(False):
            stored = {
                name: torch.zeros(1, dtype=torch.int32, device=self.device)
                for name in self._launchers.stored_dims
            }
            arena = torch.empty(self.program.arena_bytes, dtype=torch.uint8, device=self.device)
        bound = _Bound(arena, stored)
        if state is not None:
            state.scratch[self] = bound
        return bound


def _pointers(memory: Memory, step: Step, reads: tuple[int, ...], writes: tuple[int, ...]) -> list[Tensor]:
    """A kernel's tensor arguments; only their addresses and element types count."""
    values = (*step.op.operands, *step.op.results)
    return [memory.pointer(n, v) for n, v in zip((*reads, *writes), values, strict=True)]


_HEAD_START = 100_000  # clock cycles, about 50 microseconds, in which the host queues one launch


def _cuda_seconds(steps: Sequence[tuple[str, Callable[[], None]]]) -> list[float]:
    """Seconds on the device, by events around each launch.

    The device sleeps until everything is queued, so that it never waits for the host between two events.
    """
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in steps]
    failed = []
    refused: set[str] = set()
    torch.cuda._sleep(_HEAD_START * len(steps))
    for (name, run), (before, after) in zip(steps, marks, strict=True):
        before.record()
        failed.append(not _survives(name, run, refused))
        after.record()
    torch.cuda.synchronize()
    return [
        float("inf") if bad else before.elapsed_time(after) / 1e3
        for bad, (before, after) in zip(failed, marks, strict=True)
    ]


def _wall_seconds(name: str, run: Callable[[], None], refused: set[str]) -> float:
    start = time.perf_counter()
    return time.perf_counter() - start if _survives(name, run, refused) else float("inf")


def _survives(name: str, run: Callable[[], None], refused: set[str]) -> bool:
    """Run a step. False, with a warning, where Triton refuses it (it does not compile, or needs more than there is).

    refused: kernels that were, which are not tried again.
    """
    if name in refused:
        return False
    from triton.errors import TritonError

    try:
        run()
    except (TritonError, RuntimeError, AssertionError) as error:  # Triton asserts what descriptors need
        refused.add(name)
        warnings.warn(f"kernel {name} does not run with this tile: {error}", stacklevel=2)
        return False
    return True
