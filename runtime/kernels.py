"""The kernels of one program: launched by name, lightly, and replaced where one turns out not to run.

Whether a kernel compiles, and fits the registers and shared memory of a device, shows at its first launch. Who built
the program may hand in a ``Replacement``, which prints the kernel in another way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.ir.program import KernelBuildError, TilewrightError

from .cuda_graph import is_recording
from .kernel_modules import Launch, load_launchers

Replacement = Callable[[str, Exception], Path]
"""(kernel, why it does not run) -> a module that holds it printed in another way. Each call gives another one; raises
KernelBuildError when there is none left."""

# What CUDA says at every call after one that broke the context, and when its memory is full. No tile changes that.
_OF_ANOTHER = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "hardware stack error",
    "not supported on global/shared address space",
    "unspecified launch failure",
    "launch timed out",
    "device-side assert",
    "uncorrectable ECC error",
)
_FULL = "out of memory"


class Launcher:
    """Launches one kernel on one device, from the second time on without Triton's JIT.

    That looks at every argument, option and global variable to find what it compiled, which takes several times as long
    as the launch itself. What it compiles depends on the element types of pointers, which a program fixes, on whether
    they are divisible by 16, and on whether integers fit 32 bits (dims are otherwise not specialised on). So what the
    first launch gave is kept under these facts, and launched as it is: ``CompiledKernel[grid](*arguments)`` is the same
    in all versions of Triton from 3.6 to 3.9, and runs the hooks of profilers. The interpreter compiles nothing and
    gives None; its launches stay as they are.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._compiled: dict[tuple[bool, ...], Any] = {}

    @property
    def compiled(self) -> int:
        """How many times Triton's JIT was asked for a kernel: once, unless arguments differ in these facts."""
        return len(self._compiled)

    def __call__(self, pointers: list[Tensor], dims: Mapping[str, int | Tensor]) -> None:
        facts = (*[p.data_ptr() % 16 == 0 for p in pointers], *map(_fact, dims.values()))
        compiled = self._compiled.get(facts)
        if compiled is not None:
            self._launch(pointers, dims, compiled)
            return
        compiled = self._launch(pointers, dims)
        if compiled is not None:
            self._compiled[facts] = compiled


def _fact(dim: int | Tensor) -> bool:
    return -(2**31) <= dim < 2**31 if isinstance(dim, int) else dim.data_ptr() % 16 == 0


class Kernels:
    """Launches the kernels of the module at ``path``; safe for several threads.

    ``names``, ``stored_dims``, ``persistent`` and ``functions`` are those of the module. Raises KernelBuildError when
    it cannot be loaded.
    """

    def __init__(self, path: Path, replacement: Replacement | None = None) -> None:
        launchers = load_launchers(path)
        self.names, self.stored_dims = frozenset(launchers.of), launchers.stored_dims
        self.persistent, self.functions = launchers.persistent, launchers.functions
        self._launchers = {name: Launcher(launch) for name, launch in launchers.of.items()}
        self._replacement = replacement
        self._replaced = 0
        self._lock = threading.Lock()

    @property
    def compiled(self) -> int:
        """How many kernels Triton's JIT was asked for so far, replaced ones included."""
        return self._replaced + sum(launcher.compiled for launcher in self._launchers.values())

    def launch(self, name: str, pointers: list[Tensor], dims: Mapping[str, int | Tensor]) -> None:
        """Launch a kernel; one that does not run is replaced, for this launch and all later ones.

        Raises KernelBuildError when no way to print it runs, and whatever is not the kernel's fault as it is.
        """
        while True:
            launcher = self._launchers[name]
            try:
                return launcher(pointers, dims)
            except Exception as error:
                # While a stream is recorded, nothing can be compiled or loaded: that is no fault of the tile.
                if not is_refusal(error) or is_recording():
                    raise
                self._replace(name, launcher, error)

    def try_launch(self, name: str, pointers: list[Tensor], dims: Mapping[str, int | Tensor]) -> None:
        """Launch a kernel as it is. Raises KernelBuildError when it does not run."""
        try:
            self._launchers[name](pointers, dims)
        except Exception as error:
            if not is_refusal(error):
                raise
            raise _refused(name, error) from error

    def _replace(self, name: str, refused: object, error: Exception) -> None:
        with self._lock:
            if self._launchers[name] is not refused:
                return  # another thread has replaced it
            if self._replacement is None:
                raise _refused(name, error) from error
            path = self._replacement(name, error)
            launchers = load_launchers(path)
            if launchers.stored_dims != self.stored_dims:
                raise KernelBuildError(f"{path} does not take the dims of the module that it replaces")
            self._replaced += self._launchers[name].compiled
            self._launchers[name] = Launcher(launchers.of[name])


def is_refusal(error: Exception) -> bool:
    """True when an error says that a kernel cannot be compiled, loaded or launched in the tile that it has.

    Not for wrong arguments, a full device, or a fault of an earlier launch, which CUDA reports at the next one.
    """
    from triton.errors import TritonError

    if isinstance(error, TilewrightError | torch.OutOfMemoryError | torch.AcceleratorError):
        return False
    text = str(error)
    if any(words in text for words in (*_OF_ANOTHER, _FULL)):
        return False
    # Triton asserts what descriptors of tensors need.
    return isinstance(error, TritonError | RuntimeError | AssertionError)


def _refused(name: str, error: Exception) -> KernelBuildError:
    return KernelBuildError(f"kernel {name} does not run with this tile: {error}")
