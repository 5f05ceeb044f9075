"""Tiles that are timed on a GPU: what is written, with executors that only tell made-up times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import tiles
from tests.benchmarks.test_estimates import run
from tilewright.codegen.triton.work import ProductWork


class _Executor:
    """The n-th one takes n + 1 microseconds for everything; the third runs nothing."""

    def __init__(self, n: int, steps: int) -> None:
        self.taken = [float("inf") if n == 2 else (n + 1) * 1e-6] * steps

    def step_seconds(self, *_: Any) -> list[float]:
        return self.taken


def test_times_are_written_by_tile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file that the cost model is held to: works that can be read back, tiles with the default first."""
    shown: list[Sequence[Any]] = []

    def build(programs: Sequence[Any], weights: dict[str, torch.Tensor], _: Any, variants: Any) -> Any:
        shown.append(variants)
        steps = len(list(programs[0].trace()))
        return SimpleNamespace(executors=[_Executor(n, steps) for n in range(len(variants))])

    monkeypatch.setattr(tiles, "build", build)
    monkeypatch.setattr(tiles, "is_interpreting", lambda: True)
    monkeypatch.setattr(tiles, "random_weights", lambda *_: {})
    monkeypatch.setattr(tiles.Trial, "of", lambda program, spec: _trial(program))
    file = tmp_path / "tiles.json"
    code, text = run(
        tiles.main, "--precision", "bf16", "--batch-sizes", "8", "--most", "4", "--output", str(file)
    )
    assert code == 0, text
    found = json.loads(file.read_text())
    assert found["columns"][-1] == "microseconds"
    assert {k["kernel"].split()[2] for k in found["kernels"]} == {"decode_b8", "prefill"}
    for kernel in found["kernels"]:
        work, times = ProductWork(**kernel["work"]), [row[-1] for row in kernel["tiles"]]
        assert work.columns >= 4096 or work.k < 4096
        assert times == sorted(times)
        assert times[0] == 1.0
        assert 3.0 not in times
    assert shown[0][0] == {name: {} for name in shown[0][0]}


def _trial(program: Any) -> SimpleNamespace:
    dims = {name: high for name, _, high in program.symbols} | {"B": 8, "S": 1, "T": 1024, "L": 1}
    return SimpleNamespace(inputs={}, dims=dims, state=None, outputs={})


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        return
    code, text = run(tiles.main)
    assert code != 0
    assert "CUDA device" in text
