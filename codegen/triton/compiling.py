"""Compile generated kernels without launching them: one, or many side by side.

Triton compiles a kernel when it is first launched, and so one after the other. What is compiled here has the key under
which that launch looks in Triton's cache on disk, as long as it gets what generated programs are given: pointers that
are divisible by 16, dims of 32 bits, and no options from the environment. A launch with anything else compiles for
itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any

from tilewright.ir.errors import KernelBuildError

from .kernel import KernelSource

_one_at_a_time = threading.Lock()


def compile_kernel(function: Any, kernel: KernelSource, arch: int) -> Any:
    """Triton's CompiledKernel for ``sm_<arch>``, from its cache on disk where that has it.

    function: the kernel's function under ``triton.jit``. Raises KernelBuildError, naming the kernel, when Triton
    rejects it or runs as interpreter.
    """
    return _compile(_source(function, kernel), kernel, arch)


def compile_ahead(wanted: Iterable[tuple[Any, KernelSource]], arch: int) -> None:
    """Compile kernels, given with their functions, for ``sm_<arch>``, the GPU that they will be launched on.

    A thread per processor compiles: Triton's passes, LLVM and the assembler all run without Python's lock. What comes
    before them, from a function's text to Triton's IR, is left to one thread at a time: kernels call the same functions
    of Triton's library, whose state it changes. What does not compile is left to its launch, which can replace it.
    """
    distinct = {}
    for function, kernel in wanted:
        with suppress(Exception):
            source = _source(function, kernel)
            distinct[source.hash(), kernel.options] = source, kernel
    if not distinct:
        return
    get_ready().join()
    # The longest first, so that none of them is what all others wait for in the end.
    longest_first = sorted(distinct.values(), key=lambda pair: len(pair[1].text), reverse=True)

    def prepare(pair: tuple[Any, KernelSource]) -> None:
        with suppress(Exception):
            compiled = _compile(*pair, arch)
            # Triton 3.6 builds a C function per signature, which launches kernels of it, in its cache too.
            _driver().launcher_cls(compiled.src, compiled.metadata)

    with ThreadPoolExecutor(min(len(distinct), os.cpu_count() or 1)) as pool:
        list(pool.map(prepare, longest_first))


@lru_cache(maxsize=1)
def get_ready() -> threading.Thread:
    """Begin to find what Triton needs for the first kernel of a process, in a thread that ends when it is there.

    Its driver, and a hash of its own files, hundreds of megabytes, which names kernels in the cache. Neither waits for
    who finds it already: threads that compile would each do it anew, one beside the other (16 of them took 3 s on two
    processors where one takes 0.4).
    """

    def find() -> None:
        with suppress(Exception):
            _driver()
        with suppress(Exception):
            from triton.runtime.cache import triton_key

            triton_key()

    thread = threading.Thread(target=find, name="tilewright-triton", daemon=True)
    thread.start()
    return thread


def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


def _source(function: Any, kernel: KernelSource) -> Any:
    """What Triton compiles: a function, the types of its arguments, and which of them are divisible by 16."""
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    class Source(ASTSource):
        def make_ir(self, *arguments: Any, **options: Any) -> Any:
            with _one_at_a_time:
                return super().make_ir(*arguments, **options)

    if not isinstance(function, JITFunction):
        raise KernelBuildError(
            "Triton runs as interpreter (TRITON_INTERPRET is set); unset it to compile kernels"
        )
    dims = {
        f"p_dim_{d}" if d in kernel.stored else d: "*i32" if d in kernel.stored else "i32"
        for d in kernel.dims
    }
    signature = {name: f"*{dtype}" for name, dtype in kernel.pointers} | dims
    signature |= {d.name: d.type for d in kernel.descriptors}
    aligned = {
        (n,): [["tt.divisibility", 16]] for n, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    return Source(function, signature, {}, aligned)


def _compile(source: Any, kernel: KernelSource, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(kernel.options))
    except Exception as error:
        raise KernelBuildError(f"kernel {kernel.name} does not compile for sm_{arch}: {error}") from error
