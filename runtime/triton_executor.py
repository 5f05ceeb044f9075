"""Runs a program whose kernels are generated Triton code, on CUDA tensors or on Triton's interpreter.

The generated module holds ``LAUNCH``: kernel name -> function(pointers, dims). Nothing else of it matters here. Memory
is bound to kernels by address, so for decode, whose tensors stay where they are, the lists of arguments are made once
per request.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tilewright.ir.program import BufferKind, CacheError, DeviceError, KernelBuildError, Program, Step

from .files import require_private, write_atomically
from .kv_state import RequestState
from .memory import Memory

Launch = Callable[[list[Tensor], Mapping[str, int]], None]


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


def load_launchers(path: Path) -> Mapping[str, Launch]:
    """Import a generated module. Raises KernelBuildError when it is none."""
    spec = importlib.util.spec_from_file_location(f"tilewright_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise KernelBuildError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        launchers: Mapping[str, Launch] = module.LAUNCH
    except Exception as error:
        raise KernelBuildError(f"generated Triton module {path} cannot be loaded: {error}") from error
    return launchers


@dataclass
class _Bound:
    """One request's arena, and (decode only) the launches with their tensors, as of a version of its state."""

    arena: Tensor
    version: int = -1
    launches: tuple[tuple[Launch, list[Tensor]], ...] = ()


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
        if missing := {s.name for s in program.kernels()} - set(self._launchers):
            raise KernelBuildError(f"{path} lacks the kernels {sorted(missing)}")
        # A program without PyTorch calls is a list of launches, which decode binds to memory once.
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
            memory = Memory(self.program, self.weights, bound.arena, inputs, state, outputs)
            if not self._static or state is None:
                for step, reads, writes in self.program.trace():
                    if step.op.opcode == "kernel":
                        self._launchers[step.name](_pointers(memory, step, reads, writes), dims)
                    else:
                        memory.run_torch(step, reads, writes, dims)
                return
            if bound.version != state.version:
                bound.launches = tuple(
                    (self._launchers[step.name], _pointers(memory, step, reads, writes))
                    for step, reads, writes in self.program.trace()
                )
                bound.version = state.version
            for launch, pointers in bound.launches:
                launch(pointers, dims)

    def _bound(self, state: RequestState | None) -> _Bound:
        if state is not None and self in state.scratch:
            found: _Bound = state.scratch[self]
            return found
        bound = _Bound(torch.empty(self.program.arena_bytes, dtype=torch.uint8, device=self.device))
        if state is not None:
            state.scratch[self] = bound
        return bound


def _pointers(memory: Memory, step: Step, reads: tuple[int, ...], writes: tuple[int, ...]) -> list[Tensor]:
    """A kernel's tensor arguments; only their addresses and element types count."""
    values = (*step.op.operands, *step.op.results)
    return [memory.pointer(n, v) for n, v in zip((*reads, *writes), values, strict=True)]
