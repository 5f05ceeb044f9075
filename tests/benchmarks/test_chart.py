"""The chart, on tiny models and made-up runs; counting, never by the clock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner, Result

from benchmarks import chart, chart_picture, chart_results, chart_run, chart_systems, stored
from benchmarks.chart_results import FORMS, SYSTEMS, Chart, Gap, Missing
from benchmarks.chart_scales import SCALES
from benchmarks.measure import Task
from benchmarks.results import EAGER, OURS, TORCH_COMPILE
from benchmarks.step_gaps import StepGap
from benchmarks.time_limit import TimeUpError
from tilewright.errors import OptionError

from .sample_results import BF16, made_up_chart, made_up_check, point, prompt

TINY = ("--scale", "tiny", "--models", "tiny-llama", "--device", "cpu", "--repeats", "1")


def run(main: Any, *arguments: str) -> Result:
    app = Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


def test_a_point_is_speedup_rate_and_share() -> None:
    one = point(batch=2)
    assert one.speedup(BF16).median == 4.0  # type: ignore[union-attr]
    assert one.rate(BF16).median == 20.0  # type: ignore[union-attr]
    assert one.share_of_floor(BF16).median == pytest.approx(0.25)  # type: ignore[union-attr]
    assert one.speedup(TORCH_COMPILE) is None


def test_a_chart_is_stored_and_read_again(tmp_path: Path) -> None:
    whole = made_up_chart(
        point(), point("tiny-opt"), prompts=(prompt(), replace(prompt(size=32), prefill=None))
    )
    whole = whole.having(Gap("tiny-opt", BF16, StepGap(1, 2e-3, 1e-3)))
    whole = whole.lacking(Missing("tiny-opt", 1, 16, EAGER, "out of memory"))
    file = stored.save(whole, tmp_path / "some-gpu" / "c.json")
    assert stored.from_json(Chart, file.read_text()) == whole
    assert chart_results.newest("tiny", "Some GPU", tmp_path) == (file, whole)
    assert chart_results.newest("paper", "Some GPU", tmp_path) is None
    assert chart_results.newest("tiny", "Another", tmp_path) is None
    again = whole.having(point(ours=2.0))
    assert [p.key for p in again.points] == [("tiny-opt", 1, 16), ("tiny-llama", 1, 16)]
    assert whole.days == "2026-01-02 to 2026-01-03"


def test_the_papers_points_are_all_planned() -> None:
    """39 points, the first token and prefill of 4k among the prompts, and no more KV state than a batch needs."""
    paper = SCALES["paper"]
    assert paper.points == 3 * 13
    assert {*paper.prompts} == {128, 1024, 4096}
    assert paper.prefill == (4096,)
    assert [paper.positions(batch) for batch in paper.contexts] == [
        8192 + 72,
        4096 + 72,
        2048 + 72,
        4096 + 72,
    ]
    some = paper.only("1:1024,prompt:4096")
    assert (some.contexts, some.prompts) == ({1: (1024,)}, (4096,))
    with pytest.raises(OptionError, match="1:17"):
        paper.only("1:17")


def test_a_chart_is_drawn(tmp_path: Path) -> None:
    """With three panels, the paper's range, device and days; and the same results give the same file."""
    names = SCALES["paper"].models
    whole = made_up_chart(*(point(name, batch) for name in names for batch in (1, 2)), scale="paper")
    files = [chart_picture.draw(whole, tmp_path / name) for name in ("c.svg", "d.svg")]
    text = files[0].read_text()
    assert text == files[1].read_text()
    for said in (
        "Llama2-7B",
        "Llama2-13B",
        "OPT-6.7B",
        "Some GPU, 2026-01-02",
        "FlashDecoding++",
        "batch 2",
        "4.00×",
    ):
        assert f"<!-- {said}" in text or said in text


@pytest.mark.parametrize(
    ("missing", "covered"),
    [
        (Missing("m", 1, 16, EAGER, ""), {(1, 16)}),
        (Missing("m", 0, 16, EAGER, ""), {(0, 16)}),
        (Missing("m", 1, 0, EAGER, ""), {(1, 16), (1, 48), (0, 16)}),
        (Missing("m", 0, 0, EAGER, ""), {(1, 16), (1, 48), (2, 16), (0, 16)}),
        (Missing("other", 0, 0, EAGER, ""), set()),
        (Missing("m", 0, 0, BF16, ""), set()),
    ],
)
def test_what_is_left_out_covers_its_points(missing: Missing, covered: set[tuple[int, int]]) -> None:
    keys = {(1, 16), (1, 48), (2, 16), (0, 16)}
    assert {key for key in keys if missing.covers(("m", *key), EAGER)} == covered


def test_a_run_adds_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are written one by one; a second run measures none of them again, another system those that lack it, with
    all that they have: a ratio is of one run."""
    common = (*TINY, "--output", str(tmp_path / "chart.json"))
    first = run(chart.main, *common, "--systems", "eager")
    assert first.exit_code == 0, first.output
    found = stored.of_file(Chart, tmp_path / "chart.json")
    assert [p.key[1:] for p in found.points] == [(1, 16), (2, 16)]
    assert [(p.size, p.prefill is not None) for p in found.prompts] == [(16, False), (32, True)]
    assert all(p.peak_bytes[EAGER] > 0 for p in found.points)
    with monkeypatch.context() as patch:
        patch.setattr(chart_run, "measured", lambda *_: pytest.fail("measured again"))
        assert run(chart.main, *common, "--systems", "eager").exit_code == 0
    more = run(chart.main, *common, "--systems", "int8")
    assert more.exit_code == 0, more.output
    points = stored.of_file(Chart, tmp_path / "chart.json").points
    int8 = f"{OURS} int8"
    assert [[s.system for s in p.decode.series] for p in points] == [[EAGER, int8]] * 2
    assert all(p.arena_bytes[int8] > 0 and p.peak_bytes[int8] > 0 for p in points)
    assert [p.decode.of(int8).batch for p in points] == [1, 2]  # type: ignore[union-attr]


def test_a_run_that_is_cut_off_keeps_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the second point; the next run begins there."""
    file, asked = tmp_path / "chart.json", []
    measured = chart_run.measured

    def cut_off(task: Task, *others: Any) -> Any:
        asked.append(task.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measured(task, *others)

    monkeypatch.setattr(chart_run, "measured", cut_off)
    common = (*TINY, "--systems", "eager", "--points", "1:16,2:16", "--output", str(file))
    assert run(chart.main, *common).exit_code != 0
    assert [p.batch for p in stored.of_file(Chart, file).points] == [1]
    assert run(chart.main, *common).exit_code == 0
    assert [p.batch for p in stored.of_file(Chart, file).points] == [1, 2]
    assert asked == ["decode"] * 3


class Broken:
    """A rival that fails in the way it is told to."""

    name, batch = TORCH_COMPILE, 1
    tasks = frozenset({"decode", "prefill"})

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def decode(self, *_: Any) -> float:
        raise self.error

    def release(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("error", "reason", "where"),
    [
        (RuntimeError("no kernel\nat all"), "RuntimeError: no kernel", (1, 16)),
        (torch.OutOfMemoryError("too much"), "out of memory", (1, 16)),
        (TimeUpError("not ready after 1 s"), "not ready after 1 s (batch 1, context 16)", (0, 0)),
    ],
)
def test_a_rival_that_fails_takes_no_point_with_it(
    error: BaseException,
    reason: str,
    where: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others are measured, the reason is stored, and the next run does not try again unless it is told to. One that
    takes too long does so once per model, not once per point."""
    build, tried = chart_systems._build, []

    def broken(source: Any, name: str, batch: int, positions: int) -> Any:
        if name != TORCH_COMPILE:
            return build(source, name, batch, positions)
        tried.append(batch)
        return Broken(error)

    monkeypatch.setattr(chart_systems, "_build", broken)
    file = tmp_path / "chart.json"
    common = (
        *TINY,
        "--systems",
        "eager,torch.compile",
        "--points",
        "1:16",
        "--output",
        str(file),
    )
    first = run(chart.main, *common)
    assert first.exit_code == 0, first.output
    found = stored.of_file(Chart, file)
    assert found.left_out == (Missing("tiny-llama", *where, TORCH_COMPILE, reason),)
    assert [s.system for s in found.points[0].decode.series] == [EAGER]
    assert run(chart.main, *common).exit_code == 0
    assert tried == [1]
    assert run(chart.main, *common, "--retry").exit_code == 0
    assert tried == [1, 1]


def test_no_point_begins_after_the_time(tmp_path: Path) -> None:
    file = tmp_path / "chart.json"
    assert run(chart.main, *TINY, "--minutes", "0.000001", "--output", str(file)).exit_code == 0
    assert not file.exists()


@pytest.mark.parametrize("change", [{"machine": {"device": "Some GPU"}}, {"versions": {"torch": "1.0"}}])
def test_a_chart_is_of_one_machine(change: dict[str, Any], tmp_path: Path) -> None:
    """Points of another device or other versions are not added to a file."""
    file = stored.save(replace(made_up_chart(point()), **change), tmp_path / "chart.json")
    before = file.read_text()
    result = run(chart.main, *TINY, "--output", str(file))
    assert result.exit_code != 0
    assert file.read_text() == before


def test_a_file_is_shown_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart, "Run", lambda *_: pytest.fail("measured"))
    file = stored.save(made_up_chart(point("llama2-7b", context=1024), scale="paper"), tmp_path / "c.json")
    result = run(chart.main, "--show", str(file))
    assert result.exit_code == 0, result.output
    assert "Targets" in result.output
    assert run(chart.main, "--show", str(tmp_path / "none.json")).exit_code != 0


def test_ours_is_named_by_the_form_of_its_weights() -> None:
    assert set(FORMS.values()) == {"bf16", "int8", "int4"}
    assert SYSTEMS[:2] == (EAGER, TORCH_COMPILE)


def test_a_checks_points_join_the_chart_of_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the check measured replaces older figures, everything else stays; its command and commit are named."""
    monkeypatch.setattr(chart_results.stored, "FOLDER", tmp_path)
    monkeypatch.setattr(chart_results.newest, "__defaults__", (tmp_path,))
    old = made_up_chart(
        point("llama2-7b", context=1024, ours=2.0), point("opt-6.7b", context=128), scale="paper"
    )
    file = stored.save(old, tmp_path / "some-gpu" / "chart.json")
    found = made_up_check().found
    newer = replace(point("llama2-7b", context=1024), commit="def", date="2026-01-05T03:04:05+00:00")
    check = replace(made_up_check(), found=replace(found, chart=made_up_chart(newer, scale="paper")))
    given = stored.save(check, tmp_path / "some-gpu" / "check.json")
    result = run(chart.main, "--add", str(given))
    assert result.exit_code == 0, result.output
    joined = stored.of_file(Chart, file)
    assert {p.key: p.commit for p in joined.points} == {
        ("llama2-7b", 1, 1024): "def",
        ("opt-6.7b", 1, 128): "abc",
    }
    assert joined.commits == "abc, def"
    assert joined.command == "python -m benchmarks.chart; python -m benchmarks.gpu_check"
    assert file.with_suffix(".svg").exists()
    other = made_up_chart(point("opt-6.7b", context=1024), scale="paper")
    (tmp_path / "elsewhere.chart").write_text(stored.to_json(other))
    assert run(chart.main, "--add", str(tmp_path / "elsewhere.chart")).exit_code == 0
    assert stored.of_file(Chart, file).point("opt-6.7b", 1, 1024) is not None
    bare = stored.save(replace(check, found=replace(found, chart=None)), tmp_path / "some-gpu" / "bare.json")
    assert "no points" in run(chart.main, "--add", str(bare)).output
