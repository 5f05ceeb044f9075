"""The speed benchmark's parts on a tiny model. What they measure is checked by counting, never by the clock."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer import Typer
from typer.testing import CliRunner, Result

import tilewright as tw
from benchmarks import build, cpu, memory, models, picture, stored
from benchmarks.build import Plan
from benchmarks.llama_context import LeftOut, require_survivor, unused_extensions
from benchmarks.measure import Task
from benchmarks.probe import bandwidth_probe
from benchmarks.results import DECODE, EAGER, OURS, Results
from benchmarks.subject import Subject
from tilewright.errors import OptionError

FEW = ["--tokens", "2", "--repeats", "2", "--compiles", "0", "--probe-bytes", str(1 << 20)]


@pytest.fixture(scope="module")
def both() -> tuple[PreTrainedModel, PreTrainedModel]:
    source = models.tiny_llama(torch.float32)
    return source, tw.compile(source, backend="reference")


def run(*arguments: str) -> Result:
    app = Typer()
    app.command()(cpu.main)
    return CliRunner().invoke(app, ["--model", "tiny", "--backend", "reference", *arguments])


def test_one_command_measures_and_stores(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    shapes = ["--contexts", "4", "--prefill", "6", "--batch", "3"]
    systems = ["--precisions", "bf16,int8", "--systems", "tilewright,eager"]
    result = run(*shapes, *systems, *FEW, "--output", str(file))
    assert result.exit_code == 0, result.output
    found = stored.from_json(Results, file.read_text())
    assert [(m.task, m.precision, m.size) for m in found.measures] == [
        ("decode", "bf16", 4), ("prefill", "bf16", 6), ("first token", "bf16", 4), ("batched decode", "bf16", 4),
        ("decode", "int8", 4), ("prefill", "int8", 6), ("first token", "int8", 4),
    ]  # fmt: skip
    systems_of = [[s.system for s in m.series] for m in found.measures]
    assert systems_of == [*[[OURS, EAGER]] * 3, [OURS, OURS], *[[OURS]] * 3]
    assert [s.batch for s in found.measures[3].series] == [1, 3]
    assert all(len(m.probe) == len(s.seconds) == 2 for m in found.measures for s in m.series)
    assert [m.precision for m in found.memory] == ["bf16"]
    assert found.memory[0].eager_peak_bytes > 0
    for title in ("Tokens per second", "Memory bandwidth", "Batched decoding", "Activation memory"):
        assert title in result.stdout


def test_what_cannot_be_built_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, precision: str, **options: Any) -> Any:
        raise OptionError("no such weights")

    monkeypatch.setattr(models, "compiled", refuse)
    file = tmp_path / "r.json"
    shapes = ["--contexts", "8", "--prefill", "8", "--precisions", "f32"]
    result = run(*shapes, *FEW, "--systems", "tilewright,eager,llama.cpp", "--output", str(file))
    assert result.exit_code == 0, result.output
    found = stored.from_json(Results, file.read_text())
    assert [[s.system for s in m.series] for m in found.measures] == [[EAGER]] * 3
    assert found.left_out == (
        "tilewright, f32: no such weights",
        "llama.cpp, f32: there is a GGUF file for smollm2 only",
    )
    assert "no such weights" in result.stderr


def test_a_run_without_matplotlib_is_stored_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(results: Results, file: Path) -> Path:
        raise LeftOut("matplotlib is not installed")

    monkeypatch.setattr(picture, "draw", absent)
    file = tmp_path / "r.json"
    shapes = ["--contexts", "8", "--prefill", "8", "--precisions", "f32", "--systems", "eager"]
    result = run(*shapes, *FEW, "--output", str(file))
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text())["kind"] == "speed"
    assert "matplotlib is not installed" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--precisions", "f64"), ("--systems", "ours"), ("--contexts", "8,x"), ("--contexts", "1")],
)
def test_options_that_make_no_sense_are_named(option: str, value: str) -> None:
    result = run(option, value)
    assert result.exit_code == 1
    assert option in result.stderr


def test_systems_take_turns_and_each_begins_once() -> None:
    order = []

    class Noted:
        batch = 1
        tasks = frozenset({DECODE})

        def __init__(self, name: str) -> None:
            self.name = name

        def decode(self, ids: torch.Tensor, tokens: int) -> float:
            order.append(self.name)
            return float(len(order))

        def bytes_per_step(self, context: int) -> int:
            return context

    def probe() -> float:
        order.append("|")
        return 1.0

    task = Task(DECODE, 6, 8, torch.zeros(1, 6, dtype=torch.int64))
    found: Any = [Noted(name) for name in "abc"]
    collected: Any = cpu._Run(None, [6], 8, 8, repeats=3)  # type: ignore[arg-type]
    collected._measure([task], "f32", found, probe)
    (measured,) = collected.measures
    assert "".join(order) == "abc" + "abc|bca|cab|"
    assert [s.seconds for s in measured.series] == [(4, 10, 13), (5, 8, 14), (6, 9, 12)]
    assert {s.bytes_per_step for s in measured.series} == {6 + 8 // 2}


def test_decoding_starts_from_the_same_context_each_time(
    both: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    ids = models.prompt(both[0], 6)
    for model in both:
        side = Subject(OURS, model)
        for _ in range(2):
            assert side.decode(ids, 3) > 0
            assert side._caches[6].get_seq_length() == 5


def test_bytes_per_step_count_weights_once_and_the_context() -> None:
    model = models.tiny_llama(torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters()) * 2  # tied: the table is the output matrix
    assert models.bytes_per_step(model, 0) == weights
    # 2 layers, keys and values, 2 heads of 16 numbers of 2 bytes
    assert models.bytes_per_step(model, 10) - weights == 10 * 2 * 2 * 2 * 16 * 2


def test_our_bytes_are_those_of_the_weights_in_use() -> None:
    """A batch reads its weights once, int8 a quarter of what f32 reads, and int4 less again."""
    plan = Plan("tiny", (OURS,), "reference", 2, 32)
    one, four = build.batches(plan, "bf16", (1, 4))
    weights = models.weight_bytes(one.model)
    assert four.bytes_per_step(10) - weights == 4 * (one.bytes_per_step(10) - weights)
    sizes = {}
    for precision in ("f32", "int8", "int4"):
        with build.built(plan, precision) as now:
            sizes[precision] = now.systems[0].bytes_per_step(1)
    assert 0.25 < sizes["int8"] / sizes["f32"] < 0.4  # scales, norms and activations come on top
    assert sizes["int4"] < sizes["int8"]


@pytest.mark.parametrize("batch", [1, 2])
def test_torch_compile_decodes_what_the_model_does(
    batch: int, monkeypatch: pytest.MonkeyPatch, both: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    """The loop around it is what is ours; compiling takes minutes, so here it compiles nothing."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    from benchmarks.torch_compile import TorchCompile

    system = TorchCompile(both[0], batch)
    ids = models.prompt(both[0], 6)
    chosen: list[int] = []
    step = system._step

    def noted(token: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        rows = step(token, given)
        assert rows.shape == (batch, 1)
        assert len(set(rows.flatten().tolist())) == 1
        chosen.append(int(rows[0]))
        return rows

    monkeypatch.setattr(system, "_step", noted)
    expected = (
        both[0].generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 6:].tolist()
    )
    for _ in range(2):
        chosen.clear()
        assert system.decode(ids, 3) > 0
        assert chosen == expected
    assert system.prefill(ids) > 0


def test_extensions_that_llama_cpp_leaves_unused_are_seen() -> None:
    info = "CPU : AVX = 1 | AVX2 = 1 | AVX512 = 1 | OPENMP = 1 |"
    assert unused_extensions(info, ["avx2", "avx512f", "avx512_vnni", "asimd"]) == ["avx512_vnni"]


def test_llama_cpp_may_die_and_the_rest_is_still_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = tmp_path / "python"
    refused.write_text("#!/bin/sh\nkill -ILL $$\n")
    refused.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(refused))
    with pytest.raises(LeftOut, match=r"dies of SIGILL with model\.gguf"):
        require_survivor(tmp_path / "model.gguf", 1)


def test_llama_cpp_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import llama_context

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    llama_context.library.cache_clear()
    with pytest.raises(LeftOut, match="pip install llama-cpp-python"):
        llama_context.library()


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
