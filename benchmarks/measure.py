"""Samples of one task, those of all systems and of the bandwidth probe taken in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from benchmarks.results import FIRST_TOKEN, PREFILL, Measure, Series
from benchmarks.system import System
from tilewright.progress import Advance

SETTLE = 0.05
"""Seconds of rest before each sample: threads of the system that ran before stop spinning."""


@dataclass(frozen=True, eq=False)
class Task:
    """What every system does for one sample: ``steps`` tokens with the prompt ``ids``, i64[1, size]."""

    name: str
    size: int
    steps: int
    ids: Tensor

    def run(self, system: System) -> float:
        """Seconds of one sample."""
        if self.name == PREFILL:
            return system.prefill(self.ids)
        if self.name == FIRST_TOKEN:
            return system.first_token(self.ids)
        return system.decode(self.ids, self.steps)

    def bytes_per_step(self, system: System) -> int:
        """What a decode step reads: the context grows while a sample runs, so its middle counts; else 0."""
        if self.name in (PREFILL, FIRST_TOKEN):
            return 0
        return system.bytes_per_step(self.size + self.steps // 2)

    def __str__(self) -> str:
        return f"{self.name} {self.size}"


def in_turns(
    runs: Sequence[Callable[[], float]],
    repeats: int,
    begin: Callable[[], None],
    end: Callable[[], None] = lambda: None,
) -> list[tuple[float, ...]]:
    """Samples of each of ``runs``, one of each in each of ``repeats`` rounds, before and after which ``begin`` and
    ``end`` are called.

    Which of them is first changes from round to round, so that a steady drift of the machine favours none.
    """
    samples: list[list[float]] = [[] for _ in runs]
    for n in range(repeats):
        begin()
        for turn in range(len(runs)):
            k = (n + turn) % len(runs)
            time.sleep(SETTLE)
            samples[k].append(runs[k]())
        end()
    return [tuple(found) for found in samples]


def measure(
    task: Task,
    precision: str,
    systems: Sequence[System],
    probe: Callable[[], float],
    repeats: int,
    advance: Advance,
) -> Measure:
    """``repeats`` rounds, each a sample of every system and one of the probe; the systems have run the task before."""
    bandwidth: list[float] = []

    def end() -> None:
        time.sleep(SETTLE)
        bandwidth.append(probe())

    runs = [partial(task.run, system) for system in systems]
    seconds = in_turns(runs, repeats, lambda: advance(str(task)), end)
    series = tuple(
        Series(system.name, samples, system.batch, task.bytes_per_step(system))
        for system, samples in zip(systems, seconds, strict=True)
    )
    return Measure(task.name, precision, task.size, task.steps, tuple(bandwidth), series)
