"""One point of the chart where systems fail, take too long, or do not fit into memory side by side."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.chart_measure import Conditions, measured, peak_bytes
from benchmarks.measure import Task
from benchmarks.time_limit import TimeUpError, limited

TASK = Task("decode", 16, 4, torch.zeros(1, 16, dtype=torch.int64))


class Hungry:
    """Holds a context from its first sample on; raises when more than ``most`` of its kind hold one."""

    tasks = frozenset({"decode"})
    batch = 1
    most = 9
    holding: set[str] = set()  # noqa: RUF012 - of all
    runs: list[str] = []  # noqa: RUF012 - of all

    def __init__(self, name: str) -> None:
        self.name = name

    def decode(self, _ids: Tensor, _tokens: int = 0) -> float:
        if len(self.holding | {self.name}) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.holding.add(self.name)
        self.runs.append(self.name)
        return 1.0

    prefill = decode

    def bytes_per_step(self, context: int) -> int:
        return context

    def release(self) -> None:
        self.holding.discard(self.name)


def conditions(probe: Any = lambda: 2.0) -> Conditions:
    return Conditions(torch.device("cpu"), 2, 5.0, probe, lambda _: None)


@pytest.mark.parametrize("most", [3, 1])
def test_systems_that_do_not_fit_together_are_measured_one_by_one(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have their samples either way, a probe per round, and nobody holds anything afterwards."""
    monkeypatch.setattr(Hungry, "most", most)
    found = measured(TASK, [Hungry(name) for name in "abc"], conditions())
    assert found.measure is not None
    assert [s.system for s in found.measure.series] == ["a", "b", "c"]
    assert all(len(s.seconds) == 2 for s in found.measure.series)
    assert found.measure.probe == (2.0, 2.0)
    assert found.left_out == {}
    assert Hungry.holding == set()


@pytest.mark.parametrize(("name", "untimed"), [("decode", 2), ("prefill", 3)])
def test_no_run_is_wasted(name: str, untimed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each takes seconds: one to get ready, one that tells the memory and warms up, and one more of a forward,
    as that is but one call of what may be recorded at the second."""
    monkeypatch.setattr(Hungry, "runs", [])
    measured(replace(TASK, name=name), [Hungry(name) for name in "ab"], conditions())
    assert sorted(Hungry.runs) == sorted("ab" * (untimed + 2))


def test_what_does_not_fit_alone_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hungry, "most", 0)
    found = measured(TASK, [Hungry("a")], conditions())
    assert found.measure is None
    assert found.left_out == {"a": "out of memory"}


def test_a_peak_is_above_what_was_there() -> None:
    there = torch.ones(1 << 20)
    peak = peak_bytes(lambda: (there[:1000] * 2, torch.ones(1000)), torch.device("cpu"))
    assert 8000 <= peak < 20_000


def test_a_limit_interrupts_and_is_over_then() -> None:
    """Even where the block swallows every ordinary error; and what was to ring does not ring later."""

    def never_ends() -> None:
        while True:
            with suppress(Exception):
                time.sleep(1)

    with pytest.raises(TimeUpError, match="not ready after"), limited(0.05):
        never_ends()
    with limited(0.05):
        pass
    time.sleep(0.1)
