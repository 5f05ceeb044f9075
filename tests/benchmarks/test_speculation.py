"""The benchmark of speculative decoding: what is asked of whom, what is stored and shown, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import compare, models, readme, speculation, speculation_results, stored
from benchmarks.results import EAGER, OURS
from benchmarks.speculation_results import (
    COLUMNS,
    EAGER_GUESSING,
    OURS_GUESSING,
    Answered,
    Question,
    SpeculationResults,
)
from tests.compiler.test_cli import word_tokenizer

from .sample_results import MACHINE, VERSIONS

RUN = SpeculationResults(
    date="2026-11-28T08:00:00+00:00",
    command="python -m benchmarks.speculation",
    machine=MACHINE | {"device": MACHINE["cpu"]},
    versions=VERSIONS,
    settings={"model": "smollm2", "threads": 2, "guesses": 7, "tokens": 96},
    questions=(
        Question(
            "repeats it",
            "bf16",
            (
                Answered(OURS_GUESSING, 80, (0.5, 0.4)),
                Answered(OURS, 80, (1.0, 1.0)),
                Answered(EAGER_GUESSING, 80, (2.0, 2.0)),
                Answered(EAGER, 96, (4.0, 4.0)),
            ),
        ),
        Question("repeats it", "int8", (Answered(OURS_GUESSING, 80, (0.5,)), Answered(OURS, 80, (0.4,)))),
    ),
)


def invoke(*arguments: str) -> Any:
    app = Typer()
    app.command()(speculation.main)
    return CliRunner().invoke(app, list(arguments))


def test_every_system_answers_every_question(tmp_path: Path) -> None:
    """On a folder with a tiny model: both systems with guesses and without, but int8 only of ours."""
    models.load("tiny", "f32").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "run.json"
    given = ["--model", str(tmp_path / "model"), "--precisions", "f32,int8", "--output", str(file)]
    result = invoke(*given, "--repeats", "2", "--tokens", "4", "--guesses", "3")
    assert result.exit_code == 0, result.output
    run = stored.of_file(SpeculationResults, file)
    assert [q.what for q in run.questions] == [
        f"{task}, {precision}" for precision in ("f32", "int8") for task in speculation.QUESTIONS
    ]
    for question in run.questions:
        systems = COLUMNS if question.precision == "f32" else (OURS_GUESSING, OURS)
        assert {a.system for a in question.answers} == set(systems)
        for answered in question.answers:
            assert 1 <= answered.tokens <= 4
            assert len(answered.seconds) == 2
            assert all(s > 0 for s in answered.seconds)
        ours, plain = question.of(OURS_GUESSING), question.of(OURS)
        assert ours is not None
        assert plain is not None
        assert ours.tokens == plain.tokens


def test_a_run_is_stored_and_read_as_it_was(tmp_path: Path) -> None:
    file = stored.save(RUN, tmp_path / "cpu" / "run.json")
    assert stored.of_file(SpeculationResults, file) == RUN
    assert speculation_results.latest(tmp_path) == [RUN]


def test_the_table_shows_rates_and_how_many_times_as_fast_guessing_is() -> None:
    head, _, bf16, int8 = speculation_results.table(RUN).markdown().splitlines()[-4:]
    assert head == f"| an answer that | {' | '.join(COLUMNS)} |"
    assert "repeats it, bf16 | 180 (170–190) | 80.0 (80.0–80.0)<br>2.25×" in bf16
    assert "24.0 (24.0–24.0)<br>7.50×" in bf16
    assert "repeats it, int8 | 160 (160–160) | 200 (200–200)<br>0.80× (0.80–0.80) | – | – |" in int8


def test_the_page_of_results_shows_the_newest_run(tmp_path: Path) -> None:
    stored.save(RUN, tmp_path / "cpu" / "a.json")
    newer = replace(RUN, date="2026-11-29T08:00:00+00:00", questions=RUN.questions[1:])
    stored.save(newer, tmp_path / "cpu" / "b.json")
    page = readme.current(tmp_path)
    assert "repeats it, int8" in page
    assert "repeats it, bf16" not in page
    assert "7 guesses at a time" in page


def test_guesses_that_pay_less_are_found(tmp_path: Path) -> None:
    slow = replace(
        RUN.questions[1], answers=(Answered(OURS_GUESSING, 80, (0.8,)), RUN.questions[1].answers[1])
    )
    before = stored.save(RUN, tmp_path / "a.json")
    after = stored.save(replace(RUN, questions=(slow,)), tmp_path / "b.json")
    (change,) = compare.changes(before, after)
    assert change.before.what == "repeats it, int8"
    assert change.ratio == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--systems", "llama.cpp"), "none of tilewright, eager"),
        (("--precisions", "f16"), "none of f32, bf16, int8, int4"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], error: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert error in " ".join(result.output.split())
