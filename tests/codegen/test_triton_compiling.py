"""Kernels compiled side by side before they are launched: a launch finds all of them, and no error gets out."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.compiler.models import tiny
from tilewright.codegen.triton import compiling
from tilewright.codegen.triton.compiling import compile_ahead, compile_kernel
from tilewright.codegen.triton.kernel import KernelSource
from tilewright.codegen.triton.program import TritonSource, emit_program
from tilewright.ir.errors import KernelBuildError

from .triton_cases import CASES
from .triton_programs import plan
from .triton_run import load, source_of

TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "i64": torch.int64,
    "i32": torch.int32,
    "i1": torch.bool,
    "u8": torch.uint8,
    "i8": torch.int8,
}
TMA = {"block_m": 64, "block_n": 16, "block_k": 32, "descriptors": 1}


class _Hopper:
    """Stands for Triton's driver of a GPU, as far as nothing is loaded or launched."""

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.threads: set[int] = set()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        self.prepared.append(source.name)
        self.threads.add(threading.get_ident())


@pytest.fixture
def hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Hopper:
    """A GPU, and an empty cache in ``tmp_path / "cache"``."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    found = _Hopper()
    monkeypatch.setattr(driver, "_active", found)
    return found


def cached(tmp_path: Path) -> dict[str, int]:
    """Every file of the cache, and when it was written."""
    return {str(p): p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}


def compiled(tmp_path: Path) -> int:
    return sum(name.endswith(".cubin") for name in cached(tmp_path))


class _Compiled:
    """Stands for a kernel: its launch compiles as Triton's JIT would, and ends there."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments, **options: self.function.run(*arguments, grid=grid, warmup=True, **options)


def launch_all(module: Any, kernels: Sequence[KernelSource], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel's launching function, on tensors that are large enough for what it describes to TMA."""
    for kernel in kernels:
        monkeypatch.setattr(module, kernel.name, _Compiled(getattr(module, kernel.name)))
        pointers = [torch.zeros(2**14, dtype=TYPES[kind]) for _, kind in kernel.pointers]
        dims: dict[str, int | Tensor] = dict.fromkeys(kernel.dims, 7)
        dims |= {d: torch.ones(1, dtype=torch.int32) for d in kernel.stored}
        assert module.LAUNCH[kernel.name](pointers, dims) is not None


def case(name: str, tile: dict[str, int]) -> TritonSource:
    kernel, text = source_of(CASES[name](), False, tile)
    return TritonSource(name, text, (kernel,))


def decode() -> TritonSource:
    """Kernels that read the context from memory, one of them persistent."""
    return emit_program(plan(tiny("llama").to(torch.bfloat16)).programs["decode_b1"], residents=1)


SOURCES = {
    "descriptors": lambda: case("matrix-bf16-many", TMA),
    "registers": lambda: case("gated-bf16-many", {"max_registers": 128}),
    "bytes": lambda: case("quantized-int8-rows-many", {}),
    "decode": decode,
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_launch_finds_what_was_compiled_ahead(
    name: str, hopper: _Hopper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the key that Triton's JIT gives it, from another file as well; and compiling ahead again finds it too."""
    source = SOURCES[name]()
    assert any(k.descriptors for k in source.kernels) == (name == "descriptors")
    assert any(k.stored for k in source.kernels) == (name == "decode")
    module = load(source.text, tmp_path / "first.py")
    compile_ahead([(getattr(module, k.name), k) for k in source.kernels], 90)
    files = cached(tmp_path)
    assert compiled(tmp_path) == len(source.kernels)
    assert sorted(hopper.prepared) == sorted(k.name for k in source.kernels)
    again = load(source.text, tmp_path / "second.py")
    compile_ahead([(getattr(again, k.name), k) for k in source.kernels], 90)
    assert cached(tmp_path) == files
    launch_all(again, source.kernels, monkeypatch)
    assert cached(tmp_path) == files


def test_a_launch_that_asks_for_something_else_compiles_for_itself(
    hopper: _Hopper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would see it."""
    source = case("softmax", {})
    module = load(source.text, tmp_path / "case.py")
    (kernel,) = source.kernels
    compile_ahead([(module.fused, kernel)], 90)
    odd = [torch.zeros(2**14 + 1, dtype=TYPES[kind])[1:] for _, kind in kernel.pointers]
    monkeypatch.setattr(module, "fused", _Compiled(module.fused))
    module.LAUNCH["fused"](odd, dict.fromkeys(kernel.dims, 7))
    assert compiled(tmp_path) == 2


def test_one_that_does_not_compile_is_left_to_its_launch(hopper: _Hopper, tmp_path: Path) -> None:
    """Neither it nor a kernel without a usable function stops the others."""
    good, bad = case("softmax", {}), case("gated-bf16-one", {})
    broken = load(bad.text.replace("tl.store(", "tl.no_such_thing("), tmp_path / "bad.py").fused
    fine = load(good.text, tmp_path / "good.py").fused
    (kernel,), (other,) = good.kernels, bad.kernels
    compile_ahead([(broken, other), (None, other), (fine, kernel)], 90)
    assert compiled(tmp_path) == 1
    assert hopper.prepared == ["fused"]
    with pytest.raises(KernelBuildError, match="fused does not compile for sm_90"):
        compile_kernel(broken, other, 90)
    with pytest.raises(KernelBuildError, match="interpreter"):
        compile_kernel(None, other, 90)


def test_without_a_driver_kernels_are_compiled_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError("0 active drivers")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_driver", missing)
    source = case("softmax", {})
    compile_ahead([(load(source.text, tmp_path / "case.py").fused, source.kernels[0])], 90)
    assert compiled(tmp_path) == 1


def test_a_kernel_is_compiled_once_by_threads_that_end(
    hopper: _Hopper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text twice is one kernel; with other options it is another."""
    monkeypatch.setattr(compiling.os, "cpu_count", lambda: 4)
    asked: list[int] = []
    genuine = triton.compile
    monkeypatch.setattr(triton, "compile", lambda *a, **k: (asked.append(1), genuine(*a, **k))[1])
    before = threading.active_count()
    sources = [case("softmax", {}), case("softmax", {}), case("softmax", {"num_warps": 8})]
    assert sources[0].kernels[0].options != sources[2].kernels[0].options
    modules = [load(s.text, tmp_path / f"case{n}.py") for n, s in enumerate(sources)]
    compile_ahead([(m.fused, s.kernels[0]) for m, s in zip(modules, sources, strict=True)], 90)
    assert len(asked) == len(hopper.prepared) == compiled(tmp_path) == 2
    assert threading.get_ident() not in hopper.threads
    assert threading.active_count() == before
    compile_ahead([], 90)


def test_what_names_kernels_is_hashed_once(
    hopper: _Hopper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own files, before threads begin that would each do it."""
    hashed: list[int] = []

    @lru_cache
    def key() -> str:
        hashed.append(threading.get_ident())
        time.sleep(0.05)  # long enough for others to come
        return "key"

    monkeypatch.setattr(compiling.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(triton.runtime.cache, "triton_key", key)
    compiling.get_ready.cache_clear()
    tiles: list[dict[str, int]] = [{}, {"num_warps": 8}, {"num_warps": 2}]
    sources = [case("softmax", tile) for tile in tiles]
    modules = [load(s.text, tmp_path / f"case{n}.py") for n, s in enumerate(sources)]
    compile_ahead([(m.fused, s.kernels[0]) for m, s in zip(modules, sources, strict=True)], 90)
    assert compiled(tmp_path) == 3
    assert hashed == [compiling.get_ready().ident]
