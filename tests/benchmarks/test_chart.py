"""The chart, the comparison of two runs, and the check of a GPU, on tiny models; counting, never by the clock."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner, Result

from benchmarks import chart, chart_picture, chart_results, compare, gpu_check, peers, readme, stored
from benchmarks.chart_results import FORMS, Chart, Point
from benchmarks.compare import changes
from benchmarks.gpu_check import GpuCheck
from benchmarks.large_models import with_random_values
from benchmarks.results import EAGER, OURS, Measure, Series
from benchmarks.step_gaps import StepGap
from tilewright.errors import OptionError

from .sample_results import MACHINE, VERSIONS, made_up

BF16 = f"{OURS} bf16"
PROBE = (4e9, 4e9, 4e9)


def run(main: Any, *arguments: str) -> Result:
    app = Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


def point(model: str = "tiny-llama", batch: int = 1, ours: float = 1.0) -> Point:
    size = 100_000_000
    decode = Measure(
        "decode", "bf16", 16, 10, PROBE,
        (Series(EAGER, (4.0, 4.0, 4.0), batch, size), Series(BF16, (ours, ours, ours), batch, size)),
    )  # fmt: skip
    return Point(model, batch, 16, decode, None, {}, {BF16: 4096}, 65536, "abc")


def made(*points: Point, date: str = "2026-01-02T03:04:05+00:00") -> Chart:
    facts = MACHINE | {"device": "Some GPU"}
    return Chart(date, "python -m benchmarks.chart", "tiny", facts, VERSIONS, points)


def test_a_point_is_speedup_rate_and_share() -> None:
    one = point(batch=2)
    assert one.speedup(BF16).median == 4.0  # type: ignore[union-attr]
    assert one.rate(BF16).median == 20.0  # type: ignore[union-attr]
    assert one.share_of_floor(BF16).median == pytest.approx(0.25)  # type: ignore[union-attr]
    assert one.speedup("torch.compile") is None


def test_a_chart_is_stored_and_read_again(tmp_path: Path) -> None:
    whole = made(point(), point("tiny-opt"))
    file = stored.save(whole, tmp_path / "some-gpu" / "c.json")
    assert stored.from_json(Chart, file.read_text()) == whole
    assert chart_results.newest("tiny", "Some GPU", tmp_path) == (file, whole)
    assert chart_results.newest("paper", "Some GPU", tmp_path) is None
    assert chart_results.newest("tiny", "Another", tmp_path) is None
    again = whole.with_point(point(ours=2.0))
    assert [p.key for p in again.points] == [("tiny-opt", 1, 16), ("tiny-llama", 1, 16)]


def test_a_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = chart_picture.draw(made(point(), point(batch=2), point("tiny-opt")), tmp_path / "c.svg")
    text = file.read_text()
    assert text.startswith("<?xml")
    assert (
        file.read_text()
        == chart_picture.draw(
            made(point(), point(batch=2), point("tiny-opt")), tmp_path / "d.svg"
        ).read_text()
    )


def test_a_chart_becomes_tables(tmp_path: Path) -> None:
    """Rates, speedup and share of each point in order; what was not measured is no row or a dash."""
    whole = point(batch=2)
    first = Measure("first_token", "bf16", 16, 1, PROBE, (Series(EAGER, (0.004,)), Series(BF16, (0.002,))))
    one = replace(point(), first_token=first, peak_bytes={EAGER: 4 << 20, BF16: 3 << 20})
    chart = replace(made(whole, one, point("tiny-opt")), scale="paper")
    stored.save(chart, tmp_path / "some-gpu" / "c.json")
    stored.save(replace(chart, scale="tiny", date="2027"), tmp_path / "some-gpu" / "later.json")
    lines = readme.current(tmp_path).splitlines()
    rates = [line for line in lines if "<br>" in line]
    assert rates == [
        "| tiny-llama, batch 1, context 16 | 2.50 | 10.0<br>4.00×<br>25% |",
        "| tiny-llama, batch 2, context 16 | 5.00 | 20.0<br>4.00×<br>25% |",
        "| tiny-opt, batch 1, context 16 | 2.50 | 10.0<br>4.00×<br>25% |",
    ]
    assert "| tiny-llama, batch 1, context 16 | 4.00 | 2.00 |" in lines
    assert "| tiny-llama, batch 1, context 16 | 4.00 MiB | 3.00 MiB | 4.00 KiB | 64.00 KiB |" in lines
    assert any(line.startswith("Some GPU; random weights; torch ") and "2026-01-02" in line for line in lines)


def test_a_point_is_measured_anew_with_all_that_it_has(tmp_path: Path) -> None:
    """One more system does not take the others away, nor mix two runs in a ratio."""
    file = tmp_path / "chart.json"
    common = (
        "--scale",
        "tiny",
        "--models",
        "tiny-llama",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--output",
        str(file),
    )
    assert run(chart.main, *common, "--systems", "eager").exit_code == 0
    assert run(chart.main, *common, "--systems", "int8").exit_code == 0
    for found in stored.from_json(Chart, file.read_text()).points:
        assert [s.system for s in found.decode.series] == [EAGER, f"{OURS} int8"]


def test_a_run_adds_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are written one by one; a second run measures none of them again, another system those that lack it."""
    file = tmp_path / "chart.json"
    common = ("--scale", "tiny", "--models", "tiny-llama", "--device", "cpu", "--repeats", "1")
    first = run(chart.main, *common, "--systems", "eager", "--output", str(file))
    assert first.exit_code == 0, first.output
    found = stored.from_json(Chart, file.read_text())
    assert [p.key[1:] for p in found.points] == [(1, 16), (1, 48), (2, 16)]
    assert [p.first_token is not None for p in found.points] == [True, False, False]
    with monkeypatch.context() as patch:
        patch.setattr(chart, "measure", lambda *_: pytest.fail("measured again"))
        assert run(chart.main, *common, "--systems", "eager", "--output", str(file)).exit_code == 0
    more = run(chart.main, *common, "--systems", "eager,bf16", "--output", str(file))
    assert more.exit_code == 0, more.output
    points = stored.from_json(Chart, file.read_text()).points
    assert len(points) == 3
    assert all(p.decode.of(BF16) is not None and p.arena_bytes[BF16] > 0 for p in points)
    assert [p.decode.of(BF16).batch for p in points] == [1, 1, 2]  # type: ignore[union-attr]


def test_no_point_begins_after_the_time(tmp_path: Path) -> None:
    file = tmp_path / "chart.json"
    run(chart.main, "--scale", "tiny", "--device", "cpu", "--minutes", "0.000001", "--output", str(file))
    assert not file.exists()


def test_a_loss_against_the_own_floor_is_found(tmp_path: Path) -> None:
    """Twice the time at the same bandwidth is a loss; half the speed on half the bandwidth is none."""
    before = stored.save(made(point()), tmp_path / "before.json")
    slower = stored.save(made(point(ours=2.0)), tmp_path / "slower.json")
    halved = point(ours=2.0)
    halved = replace(halved, decode=replace(halved.decode, probe=tuple(p / 2 for p in PROBE)))
    same = stored.save(made(halved), tmp_path / "same.json")
    (loss,) = changes(before, slower)
    assert (loss.ratio, loss.certain, loss.before.beside) == (0.5, True, "floor")
    assert [c.ratio for c in changes(before, same)] == [1.0]
    assert run(compare.main, str(before), str(slower)).exit_code == 1
    assert run(compare.main, str(before), str(same)).exit_code == 0
    assert run(compare.main, str(before), str(slower), "--tolerance", "0.6").exit_code == 0


def test_speed_results_are_compared_too(tmp_path: Path) -> None:
    files = [stored.save(made_up(ours=t), tmp_path / f"{t}.json") for t in (1.0, 1.5)]
    found = changes(*files)
    assert found[0].before.what == "decode 64, f32"
    assert found[0].ratio == pytest.approx(1 / 1.5)
    assert {c.before.system.split(",")[0] for c in found} == {OURS}


@pytest.mark.parametrize("text", ["", "[1]", '{"kind": "quality"}', '{"kind": "chart", "schema": 99}'])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.json", stored.save(made(point()), tmp_path / "good.json")
    bad.write_text(text)
    with pytest.raises(OptionError, match="bad"):
        changes(good, bad)


def test_a_gpu_check_reports_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that fails is reported, the others go on; every kernel of every program is timed, twice."""
    monkeypatch.setattr(gpu_check._Check, "chart", lambda *_: 1 / 0)
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "check.json"
    result = run(gpu_check.main, "--scale", "tiny", "--device", "cpu", "--output", str(file))
    assert result.exit_code == 1
    found = stored.from_json(GpuCheck, file.read_text())
    assert found.parts["chart"].startswith("failed: ZeroDivisionError")
    assert not any(said.startswith("failed") for name, said in found.parts.items() if name != "chart")
    programs = {(k.program.removesuffix("_vendor"), k.tuned) for k in found.kernels}
    assert programs == {(p, t) for p in ("decode_b1", "decode_b2", "prefill") for t in (False, True)}
    assert found.bandwidth > 0
    assert found.half_flops > 0
    assert [gap.batch for gap in found.gaps] == [1, 2]
    assert all(gap.model > 0 and 0 <= gap.share < 1 for gap in found.gaps)
    assert "skipped" in found.parts["tests"]
    assert json.loads(file.read_text())["kind"] == "gpu-check"
    assert "of floor" in result.output


def test_a_gap_is_what_the_model_does_not_take() -> None:
    assert StepGap(1, token=2e-3, model=1.5e-3).share == pytest.approx(0.25)
    assert StepGap(1, token=1e-3, model=1.1e-3).share == 0.0  # noise
    assert StepGap(1, token=-1e-6, model=1e-3).share == 0.0  # more of it: the longer run was the faster one


def test_the_vendor_is_asked_for_the_same_work() -> None:
    """Products and attention have a peer, other kernels have none."""
    import tilewright as tw

    fast = tw.compile(
        with_random_values("tiny-opt", torch.device("cpu"), 64), max_length=64, backend="reference"
    )
    program = fast._tilewright.engine.decode_executors[1].program
    dims = {"B": 1, "S": 1, "L": 1, "T": 16}
    times = {s.name: peers.of(s, dims, torch.device("cpu")) for s in program.kernels()}
    assert all((times[name] > 0) == ("matmul" in name or "attention" in name) for name in times)


def test_ours_is_named_by_the_form_of_its_weights() -> None:
    assert set(FORMS.values()) == {"bf16", "int8", "int4"}
