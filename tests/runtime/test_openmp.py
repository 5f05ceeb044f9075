"""Whose threads the C++ kernels run on: those of PyTorch's OpenMP library, where there is one to call."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tilewright.runtime import openmp

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="PyTorch without OpenMP"
)


@pytest.fixture(autouse=True)
def _no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def libraries() -> set[str]:
    """The files of all OpenMP libraries in this process."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    files = {line.split(maxsplit=5)[-1] for line in lines}
    return {file for file in files if Path(file).name.startswith(("libgomp", "libiomp", "libomp"))}


def test_nothing_is_loaded() -> None:
    """A second OpenMP library, whose threads PyTorch does not know of."""
    before = libraries()
    found = openmp.find()
    assert found is not None
    assert all((found.parallel, found.thread_number, found.thread_count))
    assert libraries() == before


def test_a_library_without_the_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_NAMES", ("GOMP_parallel", "omp_get_thread_num", "no_such_function"))
    assert openmp.find() is None


def test_pytorch_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library's OpenMP, whose threads PyTorch does not use."""
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    assert openmp.find() is None


@pytest.mark.parametrize("policy", ["passive", " PASSIVE "])
def test_threads_that_sleep(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert openmp.find() is None
