"""How a decode step runs on the C++ backend: the default unless something is clearly faster, remembered on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tilewright as tw
from tests.compiler.models import tiny
from tilewright import compilation, tune_native
from tilewright.runtime.native import Tuning
from tilewright.runtime.native_executor import NativeExecutor
from tilewright.trials import pick
from tilewright.tune_native import candidates


@pytest.fixture(autouse=True)
def folder(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels are tuned after steps only where a test says so: that is a library for each way to print them."""
    monkeypatch.setattr(tune_native, "is_busy", lambda: False)
    monkeypatch.setattr(compilation, "is_busy", lambda: True)
    return fresh_cache


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_candidates_begin_with_the_default(threads: int) -> None:
    """A choice that falls back to something else than the default, or a team larger than what PyTorch was given."""
    tried = candidates(threads)
    assert tried[0] == Tuning()
    assert len(set(tried)) == len(tried)
    assert all(t.threads < threads or t.threads == 0 for t in tried)


def test_noise_does_not_move_the_default() -> None:
    assert pick([1.0, 0.96, 1.2], 0.95) == 0
    assert pick([1.0, 0.9, 0.8], 0.95) == 2


def decode_executors(fast: object) -> list[NativeExecutor]:
    return list(fast._tilewright.engine.decode_executors.values())  # type: ignore[attr-defined]


def test_a_choice_is_measured_once_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second compilation takes the record; "full" measures again; "off" leaves the default."""
    measured: list[str] = []

    def fake(executor: NativeExecutor, spec: object, tried: tuple[Tuning, ...]) -> list[float]:
        measured.append(executor.program.name)
        return [1.0, 0.5, *(1.0 for _ in tried[2:])]

    monkeypatch.setattr(tune_native, "_measure", fake)
    model = tiny("llama")
    ids = torch.arange(3, 15)[None]
    plain = tw.compile(model, backend="cpp", max_length=64, autotune="off")
    assert measured == []
    for mode in ("cached", "cached", "full"):
        fast = tw.compile(model, backend="cpp", max_length=64, autotune=mode)
        wanted = candidates(torch.get_num_threads())[1]
        assert [e.tuning for e in decode_executors(fast)] == [wanted]
        assert any(f"prefetched {wanted.prefetch_bytes} bytes" in note for note in fast.report().notes)
        expected = plain.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(fast.generate(ids, max_new_tokens=6, do_sample=False), expected)
    assert measured == ["decode_b1", "decode_b1"]


def test_a_busy_machine_records_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice made beside other work, kept for good."""
    monkeypatch.setattr(tune_native, "is_busy", lambda: True)
    fast = tw.compile(tiny("llama"), backend="cpp", max_length=64, autotune="full")
    assert [e.tuning for e in decode_executors(fast)] == [Tuning()]
    assert any("the machine is busy" in note for note in fast.report().notes)


@pytest.mark.usefixtures("few_candidates")
def test_measuring_leaves_the_tuning_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real steps, for a batch of two, and real kernels."""
    monkeypatch.setattr(compilation, "is_busy", lambda: False)
    fast = tw.compile(tiny("opt"), backend="cpp", max_length=64, batch_sizes=(2,), autotune="off")
    (executor,) = decode_executors(fast)
    before = executor.tuning
    tried = candidates(2)
    seconds = tune_native._measure(executor, fast._tilewright.engine.spec, tried)
    assert len(seconds) == len(tried)
    assert all(s > 0 for s in seconds)
    assert executor.tuning == before
