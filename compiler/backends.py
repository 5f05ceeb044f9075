"""From planned programs to executors: the one place that knows the backends by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tilewright.codegen.cpp.build import build_libraries
from tilewright.codegen.cpp.program import print_program
from tilewright.codegen.triton.program import emit_program
from tilewright.ir.program import Program
from tilewright.runtime.executor import Executor
from tilewright.runtime.native import NativeLibrary
from tilewright.runtime.native_executor import NativeExecutor
from tilewright.runtime.triton_executor import TritonExecutor, is_interpreting, require_device, write_module

from .options import Options
from .reference_executor import ReferenceExecutor
from .settings import cache_dir, cxx

# Chunks of the context that decode attention is split into by a pass. The C++ primitive splits it over its own team,
# within one kernel.
SPLITS = {"cpp": 0, "triton": 16, "reference": 4}
# Rows of quantised weights that are interleaved in memory: the C++ kernels have a row per lane.
ROW_BLOCK = {"cpp": 16, "triton": 1, "reference": 1}
# Activations that share a scale where decode steps with quantised weights multiply integers; 0: they stay floats.
ACTIVATION_GROUP = {"cpp": 32, "triton": 0, "reference": 0}


@dataclass(frozen=True)
class Built:
    """Executors in the order of the programs, generated sources by file name, and what came from the cache."""

    executors: tuple[Executor, ...]
    sources: Mapping[str, str]
    from_cache: bool | None = None

    def only(self, kept: Sequence[int]) -> Built:
        """With the executors of these numbers alone; every source stays for the dump."""
        return replace(self, executors=tuple(self.executors[n] for n in kept))


def measures(options: Options) -> bool:
    """True where candidates can be told apart by time: compiled kernels on their own device."""
    return options.backend == "cpp" or (options.backend == "triton" and not is_interpreting())


def build(programs: Sequence[Program], weights: Mapping[str, Tensor], options: Options) -> Built:
    """Generate, build and load the kernels of all programs for ``options.backend``.

    Raises KernelBuildError, CompilerNotFoundError or DeviceError.
    """
    makers = {"reference": _reference, "triton": _triton, "cpp": _cpp}
    return makers[options.backend](programs, weights, options)


def _reference(programs: Sequence[Program], weights: Mapping[str, Tensor], options: Options) -> Built:
    return Built(tuple(ReferenceExecutor(p, weights) for p in programs), {})


def _triton(programs: Sequence[Program], weights: Mapping[str, Tensor], options: Options) -> Built:
    require_device(options.device)
    sources = {p.name: emit_program(p, is_interpreting()).text for p in programs}
    executors = tuple(
        TritonExecutor(p, weights, write_module(cache_dir() / "triton", sources[p.name]), options.device)
        for p in programs
    )
    return Built(executors, {f"{name}.py": text for name, text in sources.items()})


def _cpp(programs: Sequence[Program], weights: Mapping[str, Tensor], options: Options) -> Built:
    sources = {p.name: print_program(p) for p in programs}
    libraries = build_libraries(sources, cache_dir() / "cpp", cxx())
    executors = tuple(
        NativeExecutor(p, weights, NativeLibrary(libraries[p.name].path, [name for name, _, _ in p.symbols]))
        for p in programs
    )
    cached = all(library.from_cache for library in libraries.values())
    return Built(executors, {f"{name}.cpp": text for name, text in sources.items()}, cached)
