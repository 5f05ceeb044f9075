"""Where the forms of a product change places: by the cost model, and by what is on record."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import dataflow, estimates
from tilewright.backends import candidates
from tilewright.codegen.triton import dataflow as forms
from tilewright.codegen.triton.dataflow import FLAT, GEMM, GEMV, Thresholds, form_of, form_seconds, thresholds
from tilewright.codegen.triton.device import A100, H100
from tilewright.codegen.triton.tiling import Tile
from tilewright.codegen.triton.work import ProductWork
from tilewright.ir.program import Program
from tilewright.tune_kernels import KernelTuner

WORK = ProductWork(
    rows=0, columns=4096, k=4096, dots=1, itemsize=2, weight_bytes=2.0, weight_ops=0, stored_bytes=2
)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def programs() -> list[Program]:
    return estimates.plans("llama2-7b", "bf16", [1, 16], 1024, layers=1)


@pytest.mark.parametrize("device", [H100, A100])
def test_the_forms_change_places_in_their_order(device: object) -> None:
    """One row is a vector's, a few are flat, and what GEMV takes grows with each row, as it reads the weight anew."""
    found = thresholds(WORK, device)  # type: ignore[arg-type]
    assert found.flat_from is not None
    assert 2 <= found.flat_from <= 16
    assert found.gemm_from is None or found.gemm_from > found.flat_from
    times = [form_seconds(WORK, rows, device) for rows in (1, 8, 64, 256)]  # type: ignore[arg-type]
    assert min(times[0], key=times[0].__getitem__) == GEMV
    assert times[1][FLAT] < times[1][GEMV]
    assert times[2][GEMV] > 8 * times[0][GEMV]
    assert times[3][GEMM] < times[3][GEMV]


@pytest.mark.parametrize(
    ("fastest", "expected"),
    [
        ({1: GEMV, 2: FLAT, 65: GEMM}, Thresholds(2, 65)),
        ({1: FLAT, 33: GEMM}, Thresholds(1, 33)),
        ({1: GEMV, 4: GEMM, 8: FLAT}, Thresholds(4, None)),
        ({1: GEMV, 3: FLAT, 5: GEMV, 6: FLAT, 100: GEMM, 129: FLAT, 200: GEMM}, Thresholds(6, 200)),
        ({1: GEMV}, Thresholds(None, None)),
    ],
)
def test_thresholds_are_where_a_form_wins_for_good(
    fastest: dict[int, str], expected: Thresholds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretended(work: ProductWork, rows: int, device: object) -> dict[str, float]:
        best = fastest[max(m for m in fastest if m <= rows)]
        return {form: 1.0 if form == best else 2.0 for form in (GEMV, FLAT, GEMM)}

    monkeypatch.setattr(forms, "form_seconds", pretended)
    assert thresholds(WORK, H100) == expected


def test_the_form_of_a_tile() -> None:
    assert form_of(Tile(1, 4, 512), 1) == GEMV
    assert form_of(Tile(16, 64, 128), 16) == FLAT
    assert form_of(Tile(64, 64, 128), 64) == FLAT
    assert form_of(Tile(128, 128, 64), 128) == GEMM
    assert form_of(Tile(128, 64, 64, transposed=True), 128) == FLAT


def text_of(table: object) -> str:
    stream = StringIO()
    Console(file=stream, width=250).print(table)
    return stream.getvalue()


def test_a_model_has_a_row_per_shape(programs: list[Program]) -> None:
    text = text_of(dataflow.dataflow_table(programs[0], H100))
    assert "estimated for H100 80 GB, not measured" in text
    rows = [line for line in text.splitlines() if "no record" in line]
    assert [row.split("│")[1].strip() for row in rows] == [
        dataflow.shape_name(shape) for shape in dataflow.products(programs[0], H100)
    ]
    assert len(rows) >= 4
    for row, work in zip(rows, dataflow.products(programs[0], H100).values(), strict=True):
        assert str(thresholds(work, H100).flat_from) == row.split("│")[2].strip()


def test_what_was_measured_is_beside_it(programs: list[Program]) -> None:
    """A record of the tuner at M = 16 counts; one that stands because others did not run does not."""
    options = replace(estimates.options_of(torch.device("cpu"), "bf16", [1, 16], 1024), autotune="full")
    tuner = KernelTuner.of(programs[1], candidates(options), options)
    first, second = [s.name for s in programs[1].kernels() if s.name in tuner.ways and _multiplies(s)][:2]
    assert dataflow.measured(programs, options) == {}
    tuner.keep(first, tuner.ways[first][1])
    assert dataflow.measured(programs, options) == {}
    from tilewright.choices import remember

    remember(tuner._key(second), 1, [2.0, 1.0])
    found = dataflow.measured(programs, options)
    (shape,) = found
    assert list(found[shape]) == [16]
    assert found[shape][16].startswith(f"{FLAT} (matmul ")
    text = text_of(dataflow.dataflow_table(programs[1], H100, found))
    assert "M=16: flat GEMM (matmul " in text


def _multiplies(step: object) -> bool:
    return any(o.opcode == "matmul" for o in step.op.body)  # type: ignore[attr-defined]
