"""What is compiled before the first launches is what they ask for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewright as tw
from tests.compiler.models import tiny
from tilewright import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_first_launches_compile_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither kernels nor, with releases of Triton that have them, the C functions that launch these."""
    folder, after_building = tmp_path / "triton", set[str]()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))

    def cached() -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    def ahead(wanted: Iterable[tuple[Any, Any]], arch: int) -> None:
        genuine(wanted, arch)
        after_building.update(cached())

    genuine = backends.compile_ahead
    monkeypatch.setattr(backends, "compile_ahead", ahead)
    tw.compile(tiny("llama").to("cuda", torch.bfloat16), max_length=64, autotune="off")
    assert any(name.endswith(".cubin") for name in after_building)
    assert cached() == after_building
