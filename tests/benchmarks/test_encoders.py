"""The benchmark of encoders on a tiny one: what is measured, stored and shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import compare, encoder_models, encoder_results, encoders, readme, stored
from benchmarks.encoder_results import Batch, EncoderResults
from benchmarks.results import EAGER, OURS, Series


def run(*arguments: str) -> Any:
    app = Typer()
    app.command()(encoders.main)
    return CliRunner().invoke(app, list(arguments))


def test_one_command_measures_and_stores(tmp_path: Path) -> None:
    """A precision without a Hugging Face model, a batch or a sample that is missing."""
    file = tmp_path / "e.json"
    given = [
        "--models",
        "tiny",
        "--backend",
        "reference",
        "--precisions",
        "f32,int8",
        "--systems",
        "tilewright,eager",
    ]
    result = run(*given, "--batches", "1x8,3x5", "--repeats", "2", "--output", str(file))
    assert result.exit_code == 0, result.output
    found = stored.from_json(EncoderResults, file.read_text())
    assert stored.from_json(EncoderResults, stored.to_json(found)) == found
    assert [(b.precision, b.tokens, [(s.system, s.batch) for s in b.series]) for b in found.batches] == [
        ("f32", 8, [(OURS, 1), (EAGER, 1)]),
        ("f32", 5, [(OURS, 3), (EAGER, 3)]),
        ("int8", 8, [(OURS, 1)]),
        ("int8", 5, [(OURS, 3)]),
    ]
    assert all(len(s.seconds) == 2 and min(s.seconds) > 0 for b in found.batches for s in b.series)
    assert "Texts or images per second" in result.stdout


@pytest.mark.parametrize("text", ["", "8", "8x", "0x8", "1x8;2x8", "1x8x2"])
def test_what_is_no_list_of_batches_is_refused(text: str) -> None:
    result = run("--models", "tiny", "--batches", text)
    assert result.exit_code != 0
    assert "1x128,8x16" in result.output


def test_a_precision_that_no_system_runs_leaves_no_row(tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    given = ["--models", "tiny", "--precisions", "int8", "--systems", "eager", "--batches", "1x8"]
    result = run(*given, "--output", str(file))
    assert result.exit_code == 0, result.output
    assert stored.from_json(EncoderResults, file.read_text()).batches == ()


def test_a_model_of_images_is_given_images() -> None:
    """Each number of images once, whatever the lengths of texts."""
    model = encoder_models.load("vit", "bf16")
    assert encoder_models.takes_images(model)
    given = encoder_models.inputs(model, 2, 0)
    assert given["pixel_values"].shape == (2, 3, 224, 224)
    assert given["pixel_values"].dtype == model.dtype


def made_up(date: str = "2026-01-02T03:04:05+00:00", device: str = "Some CPU") -> EncoderResults:
    batches = (
        Batch("bert", "f32", 16, (Series(OURS, (1.0, 2.0), 32), Series(EAGER, (2.0, 6.0), 32))),
        Batch("vit", "bf16", 0, (Series(EAGER, (0.5, 0.5), 1),)),
    )
    machine = {"cpu": "Some CPU", "device": device, "extensions": ["avx2"], "load": 0.1}
    return EncoderResults(
        date, "run it", machine, {"torch": "2", "transformers": "5"}, {"threads": 2}, batches
    )


def test_rates_and_ratios_are_of_the_whole_batch() -> None:
    text = readme.encoders(made_up())
    for row in (
        "|  | tilewright | Hugging Face eager |",
        "| bert, 32 texts of 16 tokens, f32 | 24.0 (20.0–28.0) | 10.7 (8.00–13.3)<br>2.50× (2.25–2.75) |",
        "| vit, image, bf16 | – | 2.00 (2.00–2.00) |",
    ):
        assert row in text.splitlines()
    assert "2 threads of Some CPU (avx2)" in text


def test_runs_are_compared_by_their_ratios_to_eager(tmp_path: Path) -> None:
    """Twice as fast beside an eager mode that is no faster; a batch without ours has nothing to compare."""
    before, after = (stored.save(made_up(), tmp_path / name) for name in ("a.json", "b.json"))
    first = made_up().batches[0]
    quick = replace(first, series=(Series(OURS, (0.5, 1.0), 32), first.series[1]))
    stored.save(replace(made_up(), batches=(quick, made_up().batches[1])), after)
    (change,) = compare.changes(before, after)
    assert change.before.what == "bert, 32 texts of 16 tokens, f32"
    assert change.ratio == pytest.approx(2.0)


def test_the_newest_run_of_each_device_is_shown(tmp_path: Path) -> None:
    runs = [made_up(), made_up("2026-02-02T03:04:05+00:00"), made_up("2026-01-05T03:04:05+00:00", "Some GPU")]
    for n, each in enumerate(runs):
        stored.save(each, tmp_path / f"{n}.json")
    assert encoder_results.latest(tmp_path) == [runs[1], runs[2]]
    page = readme.current(tmp_path)
    assert page.index("2026-02-02") < page.index("Some GPU; MiniLM")
    assert "2026-01-02" not in page
