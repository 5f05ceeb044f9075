"""Compile generated kernels for a GPU that need not be there, and read what they will use of it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tilewright.ir.errors import KernelBuildError

from .compiling import compile_kernel
from .kernel import KernelSource
from .program import TritonSource

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program may use, in bytes, by compute capability."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses: registers per thread, bytes of stack (spills) and of shared memory.

    ``ptx`` is its text, which says what it is made of: ``wgmma`` and ``mma.sync`` are tensor cores, and
    ``cp.async.bulk.tensor`` is TMA.
    """

    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    ptx: str = field(default="", repr=False)

    @property
    def fits(self) -> bool:
        """True when nothing spills and shared memory suffices."""
        return self.spills == 0 and self.shared <= SHARED_LIMIT[self.arch]


def compile_program(source: TritonSource, arch: int, only: str = "") -> tuple[Resources, ...]:
    """Compile every kernel (or the one named ``only``) for ``sm_<arch>``, with pointers aligned to 16 bytes.

    Raises KernelBuildError, naming the kernel, when Triton rejects one or runs as interpreter.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.py"
        path.write_text(source.text)
        module = _load(path)
        kernels = [k for k in source.kernels if only in ("", k.name)]
        return tuple(_resources(getattr(module, k.name), k, arch, Path(folder)) for k in kernels)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tilewright_offline_{id(path)}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def _resources(function: Any, kernel: KernelSource, arch: int, folder: Path) -> Resources:
    compiled = compile_kernel(function, kernel, arch)
    cubin = folder / f"{kernel.name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    registers, spills = _usage(cubin)
    return Resources(kernel.name, arch, registers, spills, int(compiled.metadata.shared), compiled.asm["ptx"])


def _usage(cubin: Path) -> tuple[int, int]:
    """Registers and stack bytes of a cubin, read with the cuobjdump that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise KernelBuildError(f"cuobjdump reported no resource usage: {text[:200]!r}")
    return int(found[1]), int(found[2])
