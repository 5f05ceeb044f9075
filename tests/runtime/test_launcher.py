"""Launches past Triton's JIT, only when it would take the same compiled kernel; and what it compiled is found again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.runtime.kernel_modules import load_launchers, write_module
from tilewright.runtime.kernels import Launcher


class _Compiled:
    """As Triton's CompiledKernel: indexed by a grid of three, then called with the kernel's arguments."""

    def __init__(self, calls: list[tuple[str, tuple[Any, ...]]]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.calls.append(("fast", (grid, *arguments)))


class _Kernel:
    """As a function under triton.jit: each slow launch gives a compiled kernel, or, interpreted, None."""

    def __init__(self, interpreted: bool = False) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*arguments: Any, **options: int) -> Any:
            self.calls.append(("slow", (grid, *arguments)))
            assert options == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
            return None if self.interpreted else _Compiled(self.calls)

        return launch

    @property
    def ways(self) -> list[str]:
        return [way for way, _ in self.calls]


def launcher(kernel: _Kernel) -> Launcher:
    """A printed launch function of a kernel over dims S and T, around a pretended kernel."""
    from sympy import Symbol

    from tilewright.codegen.triton.kernel import KernelSource
    from tilewright.codegen.triton.program import _launcher

    options = (("num_warps", 4), ("num_stages", 2), ("enable_fp_fusion", True))
    source = KernelSource("k", "", (), ("S", "T"), 2 * Symbol("S"), options, ())
    names: dict[str, Any] = {"k": kernel}
    exec(_launcher(source), names)
    return Launcher(names["launch_k"])


def pointers(*offsets: int) -> list[Tensor]:
    """Tensors of bytes that start so many bytes after an aligned address."""
    whole = torch.zeros(64, dtype=torch.uint8)
    assert whole.data_ptr() % 16 == 0
    return [whole[n:] for n in offsets]


def test_only_the_first_launch_goes_through_the_jit() -> None:
    kernel = _Kernel()
    launch, given = launcher(kernel), pointers(0, 16)
    for length in (3, 7, 1, 16):
        launch(given, {"S": length, "T": 20})
    assert kernel.ways == ["slow", "fast", "fast", "fast"]
    assert kernel.calls[0][1][0] == (6, 1, 1)
    assert kernel.calls[0][1][3:] == (3, 20)
    assert kernel.calls[1][1][0] == (14, 1, 1)
    assert all(a is b for a, b in zip(kernel.calls[1][1][1:3], given, strict=True))
    assert kernel.calls[1][1][3:] == (7, 20)


def test_what_the_jit_tells_apart_has_a_kernel_of_its_own() -> None:
    kernel = _Kernel()
    launch, dims = launcher(kernel), {"S": 3, "T": 20}
    for offsets in ((0, 16), (0, 4), (4, 0), (0, 4), (4, 4), (32, 0)):
        launch(pointers(*offsets), dims)
    assert kernel.ways == ["slow", "slow", "slow", "fast", "slow", "fast"]
    launch(pointers(0, 0), {"S": 3, "T": 2**31})
    launch(pointers(0, 0), {"S": 3, "T": 2**31 + 5})
    launch(pointers(0, 0), {"S": 3, "T": 2**31 - 1})
    assert kernel.ways[-3:] == ["slow", "fast", "fast"]


def test_a_dim_in_memory_counts_as_a_pointer() -> None:
    kernel = _Kernel()
    launch = launcher(kernel)
    (even,), (odd,) = pointers(0), pointers(4)
    for dim in (even, odd, even):
        launch(pointers(0), {"S": 3, "T": dim})
    assert kernel.ways == ["slow", "slow", "fast"]


def test_the_interpreter_goes_its_own_way() -> None:
    kernel = _Kernel(interpreted=True)
    launch = launcher(kernel)
    for _ in range(3):
        launch(pointers(0), {"S": 3, "T": 4})
    assert kernel.ways == ["slow"] * 3


def test_triton_specialises_on_no_more_than_these_facts() -> None:
    """The installed Triton's own rule for the arguments that generated launches have."""
    from triton.backends.compiler import BaseBackend
    from triton.runtime.jit import native_specialize_impl

    def of_dim(value: int) -> Any:
        return native_specialize_impl(BaseBackend, value, False, False, True)

    def of_pointer(tensor: Tensor) -> Any:
        return native_specialize_impl(BaseBackend, tensor, False, True, True)

    assert len({of_dim(n) for n in (0, 1, 2, 16, 17, 1024, 2**31 - 1)}) == 1
    assert of_dim(2**31) != of_dim(1)
    aligned, other = pointers(0, 32), pointers(1, 4, 8)
    assert len({of_pointer(t) for t in aligned}) == len({of_pointer(t) for t in other}) == 1
    assert of_pointer(aligned[0]) != of_pointer(other[0])


def test_compiled_kernels_are_launched_by_grid_and_arguments() -> None:
    """What the light launch relies on in the installed Triton."""
    import inspect

    from triton.compiler import CompiledKernel

    assert list(inspect.signature(CompiledKernel.__getitem__).parameters) == ["self", "grid"]


KERNEL = """import triton
import triton.language as tl

@triton.jit
def {name}(p, n):
    tl.store(p, n + {number})

def launch_k(pointers, dims, compiled=None):
    return {name}

LAUNCH = {{"k": launch_k}}
STORED_DIMS = ()
"""


def key(folder: Path, name: str = "k", number: int = 1) -> str:
    """Triton's name for a kernel in a module written to ``folder``."""
    path = write_module(folder, KERNEL.format(name=name, number=number))
    found: str = load_launchers(path).of["k"]([], {}).cache_key
    return found


def test_triton_names_a_kernel_by_its_text(tmp_path: Path) -> None:
    assert key(tmp_path / "a") == key(tmp_path / "b")
    assert key(tmp_path, number=2) != key(tmp_path, number=1)


SCRIPT = """
from tests.codegen.triton_cases import CASES
from tests.codegen.triton_run import source_of
from tilewright.codegen.triton.offline import compile_program
from tilewright.codegen.triton.program import TritonSource

kernel, text = source_of(CASES["linear-bf16-many"](), False)
(found,) = compile_program(TritonSource("case", text, (kernel,)), 90)
print(found.registers)
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Printed, written to another file and compiled again elsewhere: every artefact is there already."""

    def compile_it(seed: int) -> tuple[str, dict[str, int]]:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": str(seed)}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        files = {str(p): p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        return done.stdout, files

    first, second = compile_it(1), compile_it(2)
    assert any(name.endswith(".cubin") for name in first[1])
    assert first == second
