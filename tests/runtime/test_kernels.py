"""Kernels that do not run are replaced at their first launch; what is not their fault is passed on."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tilewright.ir.program import InputError, KernelBuildError
from tilewright.runtime.kernel_modules import write_module
from tilewright.runtime.kernels import Kernels, is_refusal
from tilewright.runtime.step_times import wall_seconds

REFUSED = "out of resource: shared memory, Required: 300000, Hardware limit: 232448"


def module(folder: Path, body: str, stored: str = "") -> Path:
    """A generated module with one kernel ``k`` whose launcher does ``body``."""
    text = (
        f"def k(pointers, dims, compiled=None):\n    {body}\nLAUNCH = {{'k': k}}\nSTORED_DIMS = ({stored})\n"
    )
    return write_module(folder, text)


def raising(folder: Path, error: str = f"RuntimeError({REFUSED!r})") -> Path:
    return module(folder, f"raise {error}")


class Replacements:
    """Hands out modules in order, then raises."""

    def __init__(self, *paths: Path) -> None:
        self.paths = list(paths)
        self.asked: list[tuple[str, str]] = []

    def __call__(self, kernel: str, error: Exception) -> Path:
        self.asked.append((kernel, str(error)))
        if not self.paths:
            raise KernelBuildError("none left")
        return self.paths.pop(0)


def test_a_kernel_is_replaced_until_one_runs_and_then_for_good(tmp_path: Path) -> None:
    good = module(tmp_path, "dims['ran'] = dims.get('ran', 0) + 1")
    replacements = Replacements(raising(tmp_path, "RuntimeError('another')"), good)
    kernels = Kernels(raising(tmp_path), replacements)
    dims: dict[str, int] = {}
    for _ in range(3):
        kernels.launch("k", [], dims)
    assert dims["ran"] == 3
    assert replacements.asked == [("k", REFUSED), ("k", "another")]


def test_errors_of_triton_count(tmp_path: Path) -> None:
    error = "__import__('triton').runtime.errors.OutOfResources(300000, 232448, 'shared memory')"
    replacements = Replacements(module(tmp_path, "pass"))
    Kernels(raising(tmp_path, error), replacements).launch("k", [], {})
    assert "Hardware limit: 232448" in replacements.asked[0][1]


def test_when_none_is_left_the_call_fails(tmp_path: Path) -> None:
    with pytest.raises(KernelBuildError, match="none left"):
        Kernels(raising(tmp_path), Replacements(raising(tmp_path, "RuntimeError('x')"))).launch("k", [], {})
    with pytest.raises(KernelBuildError, match="kernel k does not run with this tile: out of resource"):
        Kernels(raising(tmp_path)).launch("k", [], {})


@pytest.mark.parametrize(
    "error",
    [
        "ValueError('Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)')",
        "TypeError('a str is no number')",
        "KeyError('T')",
        "__import__('torch').OutOfMemoryError('CUDA out of memory')",
        "RuntimeError('Triton Error [CUDA]: out of memory')",
        "RuntimeError('Triton Error [CUDA]: an illegal memory access was encountered')",
        "RuntimeError('Triton Error [CUDA]: an illegal instruction was encountered')",
        "RuntimeError('Triton Error [CUDA]: the launch timed out and was terminated')",
        "RuntimeError('Triton Error [CUDA]: uncorrectable ECC error encountered')",
        "KeyboardInterrupt()",
    ],
)
def test_what_is_not_the_kernels_fault_is_passed_on(tmp_path: Path, error: str) -> None:
    replacements = Replacements(module(tmp_path, "pass"))
    kernels = Kernels(raising(tmp_path, error), replacements)
    kind = type(eval(error))
    for launch in (kernels.launch, kernels.try_launch):
        with pytest.raises(kind):
            launch("k", [], {})
    assert replacements.asked == []


def test_a_recording_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replacements = Replacements(module(tmp_path, "pass"))
    kernels = Kernels(raising(tmp_path), replacements)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="out of resource"):
        kernels.launch("k", [], {})
    assert replacements.asked == []
    monkeypatch.undo()
    kernels.launch("k", [], {})
    assert replacements.asked == [("k", REFUSED)]


def test_our_own_errors_are_no_refusals() -> None:
    assert not is_refusal(InputError("wrong"))
    assert not is_refusal(torch.OutOfMemoryError("full"))
    assert is_refusal(RuntimeError("PassManager::run failed"))


def test_a_replacement_takes_the_same_dims(tmp_path: Path) -> None:
    kernels = Kernels(raising(tmp_path), Replacements(module(tmp_path, "pass", "'T',")))
    with pytest.raises(KernelBuildError, match="does not take the dims"):
        kernels.launch("k", [], {})


class _Barrier:
    """A dim in memory; three threads ask for its address together before the kernel does, and again in the kernel."""

    def __init__(self, parties: int) -> None:
        self.barrier, self.asked = threading.Barrier(parties, timeout=10), threading.local()

    def data_ptr(self) -> int:
        times = self.asked.__dict__.setdefault("times", 0)
        self.asked.times = times + 1
        if times == 1:
            self.barrier.wait()
        return 0


def test_threads_that_fail_together_share_a_replacement(tmp_path: Path) -> None:
    first = module(tmp_path, f"dims['waiting'].data_ptr(); raise RuntimeError({REFUSED!r})")
    replacements = Replacements(module(tmp_path, "pass"))
    kernels = Kernels(first, replacements)
    dims = {"waiting": _Barrier(3)}
    threads = [threading.Thread(target=kernels.launch, args=("k", [], dims)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replacements.asked) == 1


def test_timing_replaces_nothing_and_tries_a_bad_kernel_once(tmp_path: Path) -> None:
    counted = module(tmp_path, f"dims['ran'] += 1; raise RuntimeError({REFUSED!r})")
    replacements, dims = Replacements(), {"ran": 0}
    kernels = Kernels(counted, replacements)
    steps = [("k", lambda: kernels.try_launch("k", [], dims)), ("", lambda: None)] * 2
    with pytest.warns(UserWarning, match="kernel k does not run with this tile"):
        seconds = wall_seconds(steps)
    assert [s == float("inf") for s in seconds] == [True, False] * 2
    assert dims == {"ran": 1}
    assert replacements.asked == []
