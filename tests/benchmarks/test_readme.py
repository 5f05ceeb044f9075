"""The README's figures: written between two markers, and those of the newest stored run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import readme
from tests.benchmarks.sample_results import made_up

TEXT = f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nEnd.\n"


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
    text = readme.block(made_up())
    for row in (
        "| decode at context 64, f32 | 7.50 tokens/s (6.25–8.75) | 2.50 tokens/s (2.08–2.92) | 3.00× (3.00–3.00) |",
        "| prefill of 512, f32 | 512 tokens/s (512–512) | 256 tokens/s (256–256) | 2.00× (2.00–2.00) |",
        "| first token after a prompt of 64, bf16 | 100 ms (100–100) | 200 ms (200–200) | 2.00× (2.00–2.00) |",
        "| f32 | 20.0 s | 2.0 s |",
        "| prompt of 512, f32 | 1.00 MiB | 2.00 MiB | 4.00 MiB | 0.25 | 0 |",
    ):
        assert row in text.splitlines()
    assert "2 threads of Some CPU @ 3.00GHz (avx2)" in text
    assert "2026-01-02" in text


def test_the_newest_stored_run_is_shown(tmp_path: Path) -> None:
    assert readme.current(tmp_path) == readme.NOTHING
    made_up().save(tmp_path / "cpu" / "run.json")
    assert readme.current(tmp_path) == readme.block(made_up())


def test_check_says_whether_the_readme_is_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "README.md"
    file.write_text(TEXT)
    monkeypatch.setattr(readme, "README", file)
    monkeypatch.setattr(readme, "current", lambda: readme.block(made_up()))
    app = Typer()
    app.command()(readme.main)

    stale = CliRunner().invoke(app, ["--check"])
    assert stale.exit_code == 1
    assert "python -m benchmarks.readme" in stale.stdout
    assert file.read_text() == TEXT
    assert CliRunner().invoke(app, []).exit_code == 0
    assert CliRunner().invoke(app, ["--check"]).exit_code == 0


def test_the_readme_shows_the_newest_results() -> None:
    text = readme.README.read_text()
    assert readme.replaced(text, readme.current()) == text
