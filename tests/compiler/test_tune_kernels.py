"""Tiles of kernels chosen by measurement: per kernel, only what is clearly faster, remembered on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewright as tw
from tests.compiler.models import tiny
from tilewright import compilation
from tilewright.backends import build, candidates, no_candidates
from tilewright.ir.program import Program
from tilewright.options import check_options
from tilewright.phases import phase_report, report_dims
from tilewright.report import Report
from tilewright.runtime.executor import Executor
from tilewright.runtime.native_executor import NativeExecutor
from tilewright.trials import Trial
from tilewright.tune_kernels import KernelTuner, changes_of


@pytest.fixture(autouse=True)
def folder(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compilation, "is_busy", lambda: False)
    return fresh_cache


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def compiled(model: Any) -> Any:
    return tw.compile(model, backend="cpp", max_length=64, autotune="off")


class _Pretender:
    """Says how long its steps took instead of running them."""

    def __init__(self, program: Program, seconds: dict[str, float]) -> None:
        self.program, self.seconds = program, seconds

    def step_seconds(self, *_request: object) -> list[float]:
        return [self.seconds.get(step.name, 1.0) for step, _, _ in self.program.trace()]


def tuner_of(compiled: Any, model: Any) -> KernelTuner:
    options = check_options(model, (1,), 64, None, None, "full", "cpp", None)
    program = compiled._tilewright.engine.decode_executors[1].program
    return KernelTuner.of(program, candidates(options), options)


def test_each_kernel_takes_its_own_best(compiled: Any, model: Any) -> None:
    """One kernel is faster in way 1, another by 1% only (noise), a third fails in way 1: only the first changes."""
    tuner = tuner_of(compiled, model)
    first, second, third = list(tuner.ways)[:3]
    default = _Pretender(tuner.program, {})
    other = _Pretender(tuner.program, {first: 0.5, second: 0.99, third: math.inf})
    same = [default] * (len(tuner.variants) - 2)
    trial = Trial.step(compiled._tilewright.engine.spec, 1)
    choices = tuner.choose([default, other, *same], trial)  # type: ignore[list-item]
    assert changes_of(choices) == {first: tuner.ways[first][1]}
    assert "2.00x its default" in str(choices[0])
    assert changes_of(tuner.recall()) == changes_of(choices)


def test_a_tile_that_a_tuner_changed_is_in_the_kernels_line(compiled: Any, model: Any) -> None:
    """Fields that the tile's description has no word for, and those that it has; other kernels' lines stay."""
    options = replace(check_options(model, (1,), 64, None, None, "full", "cpp", None), backend="triton")
    program = compiled._tilewright.engine.decode_executors[1].program
    dims = report_dims(program, options)
    product = next(s.name for s in program.kernels() if any(o.opcode == "matmul" for o in s.op.body))
    before = phase_report(program, dims, options, {})
    after = phase_report(program, dims, options, {product: {"num_warps": 1, "max_registers": 64}})
    for plain, tuned in zip(before.estimates, after.estimates, strict=True):
        assert plain.tuned == ""
        assert tuned.tuned == ("num_warps=1 max_registers=64" if tuned.kernel == product else "")
        assert (tuned.tile != plain.tile) == (tuned.kernel == product)
    words = " ".join(str(Report(phases=(after,))).split())
    assert words.count("(tuned: ") == 1
    assert "num_warps=1" in words
    assert "(tuned" not in str(Report(phases=(before,)))


def test_nothing_on_record_means_the_default(compiled: Any, model: Any) -> None:
    assert tuner_of(compiled, model).recall() == ()


def test_records_hold_every_field_of_a_tile(compiled: Any, model: Any) -> None:
    """A walk by TMA is recalled as such, and not taken for another number of programs."""
    plain = tuner_of(compiled, model)

    def tuner(programs: int) -> KernelTuner:
        ways = ({}, {"descriptors": 1}, {"descriptors": 1, "persistent": programs, "group": 8})
        return KernelTuner.of(plain.program, lambda *_: ways, plain.options)

    first = next(iter(tuner(132).ways))
    times: list[dict[str, float]] = [{}, {}, {first: 0.5}]
    executors = [_Pretender(plain.program, seconds) for seconds in times]
    tuner(132).choose(executors, Trial.step(compiled._tilewright.engine.spec, 1))  # type: ignore[arg-type]
    assert changes_of(tuner(132).recall()) == {first: {"descriptors": 1, "persistent": 132, "group": 8}}
    assert tuner(264).recall() == ()


def test_kernels_without_a_choice_are_not_tuned(compiled: Any, model: Any) -> None:
    tuner = tuner_of(compiled, model)
    none = KernelTuner.of(tuner.program, no_candidates, tuner.options)
    assert none.ways == {}
    assert none.variants == ({},)
    assert 0 < len(tuner.ways) < len(tuner.program.kernels())


def test_steps_are_timed_and_compute_what_a_run_computes(compiled: Any) -> None:
    engine = compiled._tilewright.engine
    executor = engine.decode_executors[1]
    for_run, for_steps = Trial.step(engine.spec, 1), Trial.step(engine.spec, 1)
    executor.run(for_run.inputs, for_run.dims, for_run.state, for_run.outputs)
    seconds = executor.step_seconds(for_steps.inputs, for_steps.dims, for_steps.state, for_steps.outputs)
    assert len(seconds) == sum(1 for _ in executor.program.trace())
    assert all(0 <= s < 1 for s in seconds)
    assert sum(seconds) > 0
    (name,) = for_run.outputs
    assert torch.equal(for_run.outputs[name], for_steps.outputs[name])


def test_every_kind_of_program_can_be_tried(compiled: Any) -> None:
    """Decode, prefill and a module's forward: the made-up request has every input in a size that runs."""
    plain = tw.compile(
        torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval(),
        example_inputs=(torch.rand(3, 8),),
        backend="cpp",
        autotune="off",
    )
    executors = [plain._tilewright.engine.prefill_executor]
    engine = compiled._tilewright.engine
    executors += [engine.decode_executors[1], engine.prefill_executor]
    for executor, fast in zip(executors, (plain, compiled, compiled), strict=True):
        trial = Trial.of(executor.program, fast._tilewright.engine.spec)
        assert sum(executor.step_seconds(trial.inputs, trial.dims, trial.state, trial.outputs)) > 0


def test_full_measures_and_cached_remembers(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "full" chose is what "cached" builds in another compilation, and both answer as before."""

    def choose_last(self: KernelTuner, executors: Sequence[Executor], trial: Trial) -> object:
        assert all(isinstance(e, NativeExecutor) for e in executors)
        faster = dict.fromkeys(self.ways, 0.5)
        plain = [_Pretender(self.program, {}) for _ in self.variants[1:]]
        return genuine(self, [*plain, _Pretender(self.program, faster)], trial)  # type: ignore[list-item]

    genuine = KernelTuner.choose
    monkeypatch.setattr(KernelTuner, "choose", choose_last)
    full = tw.compile(model, backend="cpp", max_length=64, autotune="full")
    cached = tw.compile(model, backend="cpp", max_length=64)
    off = tw.compile(model, backend="cpp", max_length=64, autotune="off")
    for fast, words in ((full, "its default"), (cached, "as recorded")):
        assert any("weight_rows=2" in note and words in note for note in fast.report().notes)
        assert ", 4, 2>(worker" in fast.ir("source.decode_b1.cpp")
    assert ", 4, 2>(worker" not in off.ir("source.decode_b1.cpp")
    ids = torch.arange(3, 20)[None]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    for fast in (full, cached, off):
        assert torch.equal(fast.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_a_busy_machine_measures_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "is_busy", lambda: True)
    monkeypatch.setattr(KernelTuner, "choose", lambda *_: pytest.fail("measured on a busy machine"))
    fast = tw.compile(model, backend="cpp", max_length=64, autotune="full")
    assert any("tiles of kernels not measured" in note for note in fast.report().notes)


def test_variants_of_one_program_are_different_libraries(compiled: Any, model: Any) -> None:
    tuner = tuner_of(compiled, model)
    weights = compiled._tilewright.engine.decode_executors[1].weights
    built = build([tuner.program] * 2, weights, tuner.options, tuner.variants[:2])
    first, second = built.executors
    assert isinstance(first, NativeExecutor)
    assert isinstance(second, NativeExecutor)
    assert first.library.path != second.library.path
