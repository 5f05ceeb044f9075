"""From planned programs to executors: the one place that knows the backends by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tilewright.codegen.cpp import kernel as cpp_kernel
from tilewright.codegen.cpp.build import build_libraries
from tilewright.codegen.cpp.program import print_program
from tilewright.codegen.triton import compiling, estimate
from tilewright.codegen.triton.codes import BYTE_ROWS, INTEGER_ROWS
from tilewright.codegen.triton.environment import Environment
from tilewright.codegen.triton.program import emit_program
from tilewright.codegen.tunables import NONE, Changes, Tunables
from tilewright.ir.module import Op
from tilewright.ir.program import Program
from tilewright.runtime.device import is_interpreting, require_device
from tilewright.runtime.executor import Executor
from tilewright.runtime.kernel_modules import write_module
from tilewright.runtime.native import NativeLibrary
from tilewright.runtime.native_executor import NativeExecutor
from tilewright.runtime.triton_executor import TritonExecutor

from .estimates import gpu
from .fallback import TileFallback
from .options import Options
from .reference_executor import ReferenceExecutor
from .settings import cache_dir, cxx
from .tune_kernels import Candidates

# Chunks of the context that decode attention is split into by a pass. The C++ primitive splits it over its own team,
# within one kernel.
SPLITS = {"cpp": 0, "triton": 16, "reference": 4}
# Rows of quantised weights that are interleaved in memory: the C++ kernels have a row per lane.
ROW_BLOCK = {"cpp": 16, "triton": 1, "reference": 1}
# Activations that share a scale where decode steps with quantised weights multiply integers; 0: they stay floats.
ACTIVATION_GROUP = {"cpp": 32, "triton": 32, "reference": 0}
# Most rows of a decode step that are rounded by a kernel of their own, for all products with integer weights, and for
# those with int8 weights that have one scale to a row; 0: products round them as they are multiplied.
ROUNDED_ROWS = {"cpp": (0, 0), "triton": (INTEGER_ROWS, BYTE_ROWS), "reference": (0, 0)}
# Where the backend has no kernel for experts, a pass says them in ordinary ops.
SPELL_OUT_EXPERTS = {"cpp": False, "triton": True, "reference": False}
# Most rows of the blocks in which many tokens are grouped by the experts that they chose: with more, a tile's sums
# leave no registers for enough columns. 0: the backend's own kernel of experts groups them.
GROUP_EXPERTS = {"cpp": 0, "triton": 128, "reference": 0}
# Whether products of many rows read them as they are multiplied. Tensor cores take a tile from shared memory, where it
# is copied by itself; a norm computed on the way there costs such products more than half of their speed (measured on
# an H100: a gated product of 1024 rows of Llama2-7B takes 0.57 ms at best with it, at a floor of 0.23 ms).
PLAIN_ROWS = {"cpp": False, "triton": True, "reference": False}


@dataclass(frozen=True)
class Built:
    """Executors in the order of the programs, generated sources by file name, and what came from the cache."""

    executors: tuple[Executor, ...]
    sources: Mapping[str, str]
    from_cache: bool | None = None

    def only(self, kept: Sequence[int]) -> Built:
        """With the executors of these numbers alone; every source stays for the dump."""
        return replace(self, executors=tuple(self.executors[n] for n in kept))


def get_ready(options: Options) -> None:
    """Begin what building kernels will wait for and no model decides, beside what comes before it."""
    if options.backend == "triton" and not is_interpreting():
        compiling.get_ready()


def measures(options: Options) -> bool:
    """True where candidates can be told apart by time: compiled kernels on their own device."""
    return options.backend == "cpp" or (options.backend == "triton" and not is_interpreting())


def candidates(options: Options) -> Candidates:
    """The ways that the backend of ``options`` offers to print a kernel."""
    if options.backend == "triton":
        device = gpu(options.device)

        def of_triton(op: Op, program: Program) -> tuple[Changes, ...]:
            return estimate.candidates(op, Environment.of(program, False, {}, device))

        return of_triton
    return _cpp_candidates if options.backend == "cpp" else no_candidates


def _cpp_candidates(op: Op, program: Program) -> tuple[Changes, ...]:
    return cpp_kernel.candidates(op)


def no_candidates(op: Op, program: Program) -> tuple[Changes, ...]:
    """For a backend that prints every kernel in one way."""
    return (NONE,)


def build(
    programs: Sequence[Program],
    weights: Mapping[str, Tensor],
    options: Options,
    tunables: Sequence[Tunables] = (),
    residents: Sequence[int] = (),
) -> Built:
    """Generate, build and load the kernels of all programs for ``options.backend``.

    tunables: of each program's kernels; none leaves them to the printer. residents: of each program's persistent
    kernels, on backends that have them; none or 0 launches kernels one by one. Raises KernelBuildError,
    CompilerNotFoundError or DeviceError.
    """
    changes = tunables or [{} for _ in programs]
    if options.backend == "triton":
        return _triton(programs, weights, options, changes, residents or [0] * len(programs))
    makers = {"reference": _reference, "cpp": _cpp}
    return makers[options.backend](programs, weights, options, changes)


def has_persistent_kernels(options: Options) -> bool:
    """True where it can be measured whether persistent kernels are faster."""
    return options.backend == "triton" and measures(options)


def _reference(
    programs: Sequence[Program], weights: Mapping[str, Tensor], options: Options, tunables: Sequence[Tunables]
) -> Built:
    return Built(tuple(ReferenceExecutor(p, weights) for p in programs), {})


def _triton(
    programs: Sequence[Program],
    weights: Mapping[str, Tensor],
    options: Options,
    tunables: Sequence[Tunables],
    residents: Sequence[int],
) -> Built:
    require_device(options.device)
    device = gpu(options.device)
    sources = [
        emit_program(p, is_interpreting(), t, device, n)
        for p, t, n in zip(programs, tunables, residents, strict=True)
    ]
    executors = tuple(
        TritonExecutor(
            p,
            weights,
            write_module(cache_dir() / "triton", source.text),
            options.device,
            TileFallback(p, t, options, measures(options)),
        )
        for p, source, t in zip(programs, sources, tunables, strict=True)
    )
    if not is_interpreting():
        launched = ((e.functions, s.kernels) for e, s in zip(executors, sources, strict=True))
        compiling.compile_ahead(
            ((f[k.name], k) for f, kernels in launched for k in kernels if k.name in f), device.arch
        )
    return Built(executors, {f"{p.name}.py": s.text for p, s in zip(programs, sources, strict=True)})


def _cpp(
    programs: Sequence[Program], weights: Mapping[str, Tensor], options: Options, tunables: Sequence[Tunables]
) -> Built:
    texts = [print_program(p, t) for p, t in zip(programs, tunables, strict=True)]
    libraries = build_libraries(
        {f"{n} {p.name}": text for n, (p, text) in enumerate(zip(programs, texts, strict=True))},
        cache_dir() / "cpp",
        cxx(),
    )
    executors = tuple(
        NativeExecutor(p, weights, NativeLibrary(library.path, [name for name, _, _ in p.symbols]))
        for p, library in zip(programs, libraries.values(), strict=True)
    )
    cached = all(library.from_cache for library in libraries.values())
    return Built(executors, {f"{p.name}.cpp": text for p, text in zip(programs, texts, strict=True)}, cached)
