"""The figures of the README and of the page of all results: between two markers, from the newest stored runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import readme, stored
from benchmarks.results import EAGER
from tests.benchmarks.sample_results import (
    BF16,
    made_up,
    made_up_chart,
    made_up_check,
    made_up_quality,
    point,
    prompt,
)

TEXT = f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nEnd.\n"
NO_PICTURE = Path("none.svg")


def test_only_what_is_between_the_markers_changes() -> None:
    once = readme.replaced(TEXT, "new")
    assert once == f"# Title\n\n{readme.BEGIN}\nnew\n{readme.END}\n\nEnd.\n"
    assert readme.replaced(once, "new") == once


@pytest.mark.parametrize(
    "text", ["nothing", readme.BEGIN, f"{readme.END} {readme.BEGIN}", f"{TEXT}{TEXT}", TEXT + readme.END]
)
def test_missing_or_doubled_markers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        readme.replaced(text, "new")


def test_every_measure_has_its_row() -> None:
    text = readme.speed(made_up(), NO_PICTURE, readme.PAGE)
    for row in (
        "|  | tilewright | Hugging Face eager | torch.compile | llama.cpp |",
        "| decode at context 64, f32 | 7.50 (6.25–8.75) | 2.50 (2.08–2.92)<br>3.00× (3.00–3.00) "
        "| 3.75 (3.12–4.38)<br>2.00× (2.00–2.00) | 6.00 (5.00–7.00)<br>1.25× (1.25–1.25) |",
        "| decode at context 64, int8 | 15.0 (12.5–17.5) | – | – | 13.3 (10.0–16.7)<br>1.25× (1.12–1.38) |",
        "| prefill of 512, f32 | 512 (512–512) | 256 (256–256)<br>2.00× (2.00–2.00) | – | – |",
        "| first token after a prompt of 64, bf16 | 100 ms (100–100) | 200 ms (200–200)<br>2.00× (2.00–2.00) | – | – |",
        "| decode at context 64, f32 | 200 MB | 1.50 GB/s (1.25–1.75) | 3.00 GB/s (2.50–3.50) "
        "| 50% | 17% | 25% | 40% |",
        "| decode at context 64, int8 | 50 MB | 0.75 GB/s (0.62–0.88) | 3.00 GB/s (2.50–3.50) | 25% | – | – | 17% |",
        "| batched decode at context 64, bf16, batch 8 | 10.0 tokens/s (10.0–10.0) | 40.0 tokens/s (40.0–40.0) "
        "| 4.00× (4.00–4.00) | 5.00 |",
        "| f32 | 20.0 s | 2.0 s |",
        "| prompt of 512, f32 | 1.00 MiB | 2.00 MiB | 4.00 MiB | 0.25 | 0 |",
    ):
        assert row in text.splitlines()
    assert "2 threads of Some CPU @ 3.00GHz (avx2)" in text
    assert "llama-cpp-python 0.3" in text
    assert "2026-01-02" in text


def test_shares_beyond_the_probe_are_explained() -> None:
    decode = made_up().measures[0]
    quick = replace(decode, probe=tuple(rate / 3 for rate in decode.probe))
    assert "last cache" in readme.speed(replace(made_up(), measures=(quick,)), NO_PICTURE, readme.PAGE)
    assert "last cache" not in readme.speed(made_up(), NO_PICTURE, readme.PAGE)


def test_precisions_of_a_task_stand_together() -> None:
    lines = readme.speed(made_up(), NO_PICTURE, readme.PAGE).splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("| decode at context 64, f32"))
    assert lines[first + 1].startswith("| decode at context 64, int8")


def test_other_systems_stand_alone_where_ours_is_missing() -> None:
    int8 = made_up().measures[-1]
    alone = replace(int8, series=int8.series[1:])
    text = readme.speed(replace(made_up(), measures=(alone,)), NO_PICTURE, readme.PAGE)
    assert "| decode at context 64, int8 | 13.3 (10.0–16.7) |" in text.splitlines()


def test_quality_has_its_rows() -> None:
    text = readme.closeness(made_up_quality())
    for row in (
        "| Hugging Face eager, f32 | 4.482 | 0 | 100% |",
        "| tilewright, int8 | 7.389 | 0.02000 | 95.0% |",
        "| tilewright, int8 | 0.99800 | 0.00200 | 0.01000 |",
    ):
        assert row in text.splitlines()
    assert "200 tokens" in text


def test_the_newest_stored_runs_are_shown(tmp_path: Path) -> None:
    assert readme.current(tmp_path) == readme.NOTHING
    file = stored.save(made_up(), tmp_path / "cpu" / "run.json")
    assert readme.current(tmp_path) == readme.speed(made_up(), NO_PICTURE, readme.PAGE)
    file.with_suffix(".svg").write_text("<svg/>")
    assert readme.current(tmp_path).startswith("![Tokens per second by precision and system](run.svg)\n")
    older = replace(made_up("2025-01-01T00:00:00+00:00"), machine=made_up().machine | {"cpu": "Older CPU"})
    stored.save(older, tmp_path / "older" / "run.json")
    rates = readme.speed(older, NO_PICTURE, readme.PAGE, rates=True)
    assert readme.current(tmp_path).endswith(f"\n\n{rates}")
    assert "Older CPU" in rates
    assert "Memory bandwidth" not in rates
    stored.save(made_up_quality(), tmp_path / "quality.json")
    assert readme.current(tmp_path).endswith(readme.closeness(made_up_quality()))


def test_a_chart_becomes_tables(tmp_path: Path) -> None:
    """Rates, speedup and share of each point in order, with device and days; what was not measured is no row or a dash.
    A tiny chart is no figure of interest."""
    one = replace(point(), peak_bytes={EAGER: 4 << 20, BF16: 3 << 20})
    chart = made_up_chart(point(batch=2), one, point("tiny-opt"), scale="paper", prompts=(prompt(),))
    file = stored.save(chart, tmp_path / "some-gpu" / "c.json")
    stored.save(replace(chart, scale="tiny", date="2027"), tmp_path / "some-gpu" / "later.json")
    lines = readme.current(tmp_path).splitlines()
    assert [line for line in lines if "<br>" in line] == [
        "| tiny-llama, batch 1, context 16 | 2.50 | 10.0<br>4.00×<br>25% |",
        "| tiny-llama, batch 2, context 16 | 5.00 | 20.0<br>4.00×<br>25% |",
        "| tiny-opt, batch 1, context 16 | 2.50 | 10.0<br>4.00×<br>25% |",
    ]
    assert "| tiny-llama, batch 1, 16 tokens | 4.00 | 2.00 |" in lines
    assert "| tiny-llama, batch 1, 16 tokens | 4.00 | 3.00 | 2.00 |" in lines
    assert "| tiny-llama, batch 1, context 16 | 4.00 MiB | 3.00 MiB | 4.00 KiB | 64.00 KiB |" in lines
    every = "every point: bf16 over Hugging Face eager (3 of 39 measured)"
    assert f"| {every} | ≥ 2.50× | 4.00× | not known |" in lines
    (note,) = (line for line in lines if line.startswith("Some GPU; random weights; torch "))
    assert "2026-01-02 to 2026-01-03; `python -m benchmarks.chart`" in note
    file.with_suffix(".svg").write_text("<svg/>")
    assert "![Speedup over Hugging Face eager](c.svg)" in readme.current(tmp_path)


def test_a_check_of_a_gpu_has_its_section(tmp_path: Path) -> None:
    """Its kernels always; its points and the targets where there is no chart of that device. The newest file counts."""
    stored.save(made_up_check("tiny"), tmp_path / "tiny.json")
    assert readme.current(tmp_path) == readme.NOTHING
    stored.save(made_up_check(), tmp_path / "a.json")
    stored.save(replace(made_up_check(seconds=9.0), date="2025"), tmp_path / "old.json")
    text = readme.current(tmp_path)
    assert (
        "| decode_b1: matmul_1 | 2000.0 | 1000.0 | 50% | 2.00 GB/s | – | 3000.0 | 4000.0 |"
        in text.splitlines()
    )
    assert "| llama2-7b: compiling, untuned | ≤ 30.0 s | 25.0 s | yes |" in text.splitlines()
    assert "Some GPU; random weights; torch 2.0" in text
    assert "2026-01-02; `python -m benchmarks.gpu_check`" in text
    assert text.count("matmul_1") == 1
    stored.save(made_up_chart(point("llama2-7b"), scale="paper"), tmp_path / "chart.json")
    both = readme.current(tmp_path)
    assert both.count("Targets") == 1
    assert "matmul_1" in both


def test_the_readme_has_the_rates_alone(tmp_path: Path) -> None:
    """Of the newest CPU and of each GPU; the page has the rest, with links that work from where it lies."""
    assert readme.summary(tmp_path) == readme.NOTHING
    older = replace(made_up("2025-01-01T00:00:00+00:00"), machine=made_up().machine | {"cpu": "Older CPU"})
    for name, run in {"new": made_up(), "old": older}.items():
        stored.save(run, tmp_path / name / "run.json")
    stored.save(made_up_chart(point(), scale="paper"), tmp_path / "gpu" / "chart.json")
    text = readme.summary(tmp_path)
    assert text.startswith(readme.speed(made_up(), NO_PICTURE, readme.README, rates=True))
    assert "Older CPU" not in text
    assert "| tiny-llama, batch 1, context 16 | 2.50 | 10.0<br>4.00×<br>25% |" in text.splitlines()
    assert "Targets" not in text
    assert "Targets" in readme.current(tmp_path)


def test_check_says_whether_both_pages_are_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"README": tmp_path / "README.md", "PAGE": tmp_path / "results" / "README.md"}
    files["PAGE"].parent.mkdir()
    for name, file in files.items():
        file.write_text(TEXT)
        monkeypatch.setattr(readme, name, file)
    for name in ("summary", "current"):
        monkeypatch.setattr(readme, name, lambda name=name: name)
    app = Typer()
    app.command()(readme.main)

    stale = CliRunner().invoke(app, ["--check"])
    assert stale.exit_code == 1
    assert stale.stdout.count("python -m benchmarks.readme") == 2
    assert files["README"].read_text() == TEXT
    assert CliRunner().invoke(app, []).exit_code == 0
    assert "\nsummary\n" in files["README"].read_text()
    assert "\ncurrent\n" in files["PAGE"].read_text()
    assert CliRunner().invoke(app, ["--check"]).exit_code == 0
    files["PAGE"].write_text(TEXT)
    assert CliRunner().invoke(app, ["--check"]).exit_code == 1


def test_both_pages_show_the_newest_results() -> None:
    for page, text in ((readme.README, readme.summary()), (readme.PAGE, readme.current())):
        assert readme.replaced(page.read_text(), text) == page.read_text()


def test_pictures_are_where_the_pages_say() -> None:
    for page in (readme.README, readme.PAGE):
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / link).is_file()
