"""Result files: what goes in comes out, and figures follow from the samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import quality_results, results, stored
from benchmarks.quality_results import QualityResults
from benchmarks.results import Results
from tests.benchmarks.sample_results import made_up, made_up_quality


def test_json_round_trip() -> None:
    for result in (made_up(), made_up_quality()):
        assert stored.from_json(type(result), stored.to_json(result)) == result


def test_another_schema_is_refused() -> None:
    data = json.loads(stored.to_json(made_up()))
    with pytest.raises(ValueError, match=r"schema 99.*benchmarks\.cpu"):
        stored.from_json(Results, json.dumps(data | {"schema": 99}))


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind speed"):
        stored.from_json(QualityResults, stored.to_json(made_up()))


@pytest.mark.parametrize("missing", ["measures", "date"])
def test_a_file_with_something_missing_is_refused(missing: str) -> None:
    data = json.loads(stored.to_json(made_up()))
    del data[missing]
    with pytest.raises(ValueError, match=missing):
        stored.from_json(Results, json.dumps(data))


def test_results_are_stored_by_cpu_date_and_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "FOLDER", tmp_path)
    file = stored.save(made_up())
    assert file == tmp_path / "some-cpu-3-00ghz" / "2026-01-02T030405-speed.json"
    assert stored.save(made_up_quality()).name == "2026-01-02T030405-quality.json"
    assert stored.from_json(Results, file.read_text()) == made_up()


def test_the_newest_run_of_a_kind_counts_whatever_its_file_is_called(tmp_path: Path) -> None:
    later = made_up("2026-05-01T00:00:00+00:00")
    file = stored.save(later, tmp_path / "a.json")
    stored.save(made_up(), tmp_path / "b" / "z.json")
    quality = made_up_quality("2026-06-01T00:00:00+00:00")
    other = stored.save(quality, tmp_path / "c.json")
    assert results.latest(tmp_path) == [(file, later)]
    assert quality_results.newest(tmp_path) == (other, quality)


def test_an_empty_folder_has_no_newest_run(tmp_path: Path) -> None:
    assert results.latest(tmp_path) == []
    assert quality_results.newest(tmp_path) is None


def test_each_processor_has_its_newest_run(tmp_path: Path) -> None:
    other = replace(made_up("2026-03-01T00:00:00+00:00"), machine=made_up().machine | {"cpu": "Another CPU"})
    second = stored.save(other, tmp_path / "a.json")
    stored.save(made_up(), tmp_path / "b.json")
    later = made_up("2026-05-01T00:00:00+00:00")
    first = stored.save(later, tmp_path / "c.json")
    assert results.latest(tmp_path) == [(first, later), (second, other)]


def test_figures_of_a_decode_measure() -> None:
    decode = made_up().measures[0]
    ours, eager = decode.of("tilewright"), decode.of("Hugging Face eager")
    assert ours is not None
    assert eager is not None
    assert decode.rates(ours) == (10, 5)
    assert decode.ratio(ours, eager).median == 3
    assert decode.bandwidths(ours) == (2e9, 1e9)
    assert decode.share_of_probe(ours).median == pytest.approx(0.5)
    assert decode.limits(ours) == (20, 10)
    assert replace(decode, steps=20).rates(ours) == (20, 10)
    assert decode.of("another") is None


def test_a_batch_counts_all_of_its_tokens() -> None:
    batched = made_up().measures[3]
    one, eight = batched.series
    assert batched.rates(eight) == (40, 40)
    assert batched.ratio(eight, one).median == 4
    assert batched.limits(eight) == (160, 80)
    assert batched.bandwidths(eight) == (1e9, 1e9)


def test_perplexity_is_that_of_all_windows_together() -> None:
    assert made_up_quality().closeness[0].perplexity == pytest.approx(2.718281828**1.5)
