"""Result files: what goes in comes out, and figures follow from the samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.results import Results, newest
from tests.benchmarks.sample_results import made_up


def test_json_round_trip() -> None:
    results = made_up()
    assert Results.from_json(results.to_json()) == results


def test_another_schema_is_refused() -> None:
    data = json.loads(made_up().to_json())
    with pytest.raises(ValueError, match="schema 99"):
        Results.from_json(json.dumps(data | {"schema": 99}))


@pytest.mark.parametrize("missing", ["measures", "date"])
def test_a_file_with_something_missing_is_refused(missing: str) -> None:
    data = json.loads(made_up().to_json())
    del data[missing]
    with pytest.raises(ValueError, match=missing):
        Results.from_json(json.dumps(data))


def test_results_are_stored_by_cpu_and_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.results.FOLDER", tmp_path)
    file = made_up().save()
    assert file == tmp_path / "some-cpu-3-00ghz" / "2026-01-02T030405.json"
    assert Results.from_json(file.read_text()) == made_up()


def test_the_newest_run_counts_whatever_its_file_is_called(tmp_path: Path) -> None:
    later = made_up("2026-05-01T00:00:00+00:00")
    later.save(tmp_path / "a.json")
    made_up().save(tmp_path / "b" / "z.json")
    assert newest(tmp_path) == later


def test_no_results_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.cpu"):
        newest(tmp_path)


def test_figures_of_a_decode_measure() -> None:
    decode = made_up().measures[0]
    assert decode.rate(decode.ours).median == pytest.approx(7.5)  # of 10 and 5 tokens/s
    assert decode.speedup.median == 3.0
    assert decode.bandwidth.high == pytest.approx(1.75e9)  # of 2 and 1 GB/s
    assert decode.share_of_probe.median == pytest.approx(0.5)
    assert replace(decode, tokens=20).rate(decode.ours).median == pytest.approx(15)
