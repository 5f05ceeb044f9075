"""The benchmark's parts on a tiny model. What they measure is checked by counting, never by the clock."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from typer import Typer
from typer.testing import CliRunner

import tilewright as tw
from benchmarks import cpu, memory, models
from benchmarks.probe import bandwidth_probe
from benchmarks.results import Results
from benchmarks.subject import Subject


@pytest.fixture(scope="module")
def both() -> tuple[PreTrainedModel, PreTrainedModel]:
    source = models.tiny_llama(torch.float32)
    return source, tw.compile(source, backend="reference")


def test_one_command_measures_and_stores(tmp_path: Path) -> None:
    app = Typer()
    app.command()(cpu.main)
    arguments = [
        "--model",
        "tiny",
        "--backend",
        "reference",
        "--dtypes",
        "f32",
        "--contexts",
        "8",
        "--prefill",
        "16",
    ]
    few = ["--tokens", "2", "--repeats", "2", "--compiles", "0", "--probe-bytes", str(1 << 20)]
    file = tmp_path / "r.json"
    result = CliRunner().invoke(app, [*arguments, *few, "--output", str(file)])
    assert result.exit_code == 0, result.output
    stored = Results.from_json(file.read_text())
    assert [(m.task, m.size) for m in stored.measures] == [
        ("decode", 8), ("prefill", 16), ("first token", 8), ("first token", 16),
    ]  # fmt: skip
    assert all(len(m.ours) == len(m.theirs) == len(m.probe) == 2 for m in stored.measures)
    assert stored.memory[0].eager_peak_bytes > 0
    for title in ("Speed", "Memory bandwidth", "Activation memory"):
        assert title in result.stdout


@pytest.mark.parametrize(
    ("option", "value"), [("--dtypes", "f64"), ("--contexts", "8,x"), ("--contexts", "1")]
)
def test_options_that_make_no_sense_are_named(option: str, value: str) -> None:
    app = Typer()
    app.command()(cpu.main)
    result = CliRunner().invoke(app, ["--model", "tiny", option, value])
    assert result.exit_code == 1
    assert option in result.stderr


def test_decoding_starts_from_the_same_context_each_time(
    both: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    ids = models.prompt(both[0], 6)
    for model in both:
        side = Subject(model)
        for _ in range(2):
            assert side.decode(ids, 3) > 0
            assert side._caches[6].get_seq_length() == 5


def test_bytes_per_token_counts_weights_once_and_the_context() -> None:
    model = models.tiny_llama(torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters()) * 2  # tied: the table is the output matrix
    assert models.bytes_per_token(model, 0) == weights
    # 2 layers, keys and values, 2 heads of 16 numbers of 2 bytes
    assert models.bytes_per_token(model, 10) - weights == 10 * 2 * 2 * 2 * 16 * 2


def test_peak_is_what_was_live_at_once() -> None:
    assert memory.peak([100, -100, 60, 50, -60, -50]) == 110
    assert memory.peak([]) == 0


def test_allocations_of_torch_are_seen_in_order() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(3000, dtype=torch.uint8)
        del first
        return second

    sizes = [size for size in memory.allocation_events(run) if abs(size) >= 1000]
    assert sizes == [1000, 3000, -1000]


def test_eager_peak_grows_with_the_prompt(both: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    peaks = [memory.eager_peak(both[0], models.prompt(both[0], length)) for length in (32, 128)]
    # The widest moment of a layer holds at least gate, up and their product, f32 [S, 96] each.
    assert peaks[1] >= 3 * 128 * 96 * 4
    assert 3 < peaks[1] / peaks[0] < 5


def test_the_probe_reads_every_byte() -> None:
    with bandwidth_probe(threads=2, nbytes=1 << 20) as probe:
        assert probe(rounds=2) > 0
        probe._buffer[0] = 7
        with pytest.raises(RuntimeError, match="bandwidth probe"):
            probe(rounds=1)
