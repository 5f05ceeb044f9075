"""How the C++ kernels of a decode step run: the size of the team and the prefetch distance, chosen by measurement.

Both are arguments of a run, so that trying one costs a few steps and no compilation. What is best differs with the
batch size (more rows, more arithmetic per weight) and with the form of the weights (fewer bytes per product), so each
decode program has its own choice. Beside other work, figures would tell of that work: threads that wait for each other
suffer most. So on a busy machine the default is taken, and nothing is recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tilewright.runtime.executor import EngineSpec
from tilewright.runtime.native import Tuning
from tilewright.runtime.native_executor import NativeExecutor

from .choices import remember, remembered
from .trials import Trial, pick, time_in_turns

PREFETCH_BYTES = (2048, 4096, 8192, 16384)
_ROUNDS = 6
_STEPS = 3
_BUSY = 0.75  # runnable threads per processor, over the last minute
_CLEARLY = 0.95
"""The share of the default's time that ``trials.pick`` asks for."""


def candidates(threads: int) -> tuple[Tuning, ...]:
    """The default first; then other distances, then smaller teams (a small model is faster on one thread, and the two
    threads of a core share its way to memory)."""
    others = [Tuning(0, distance) for distance in PREFETCH_BYTES if distance != Tuning.prefetch_bytes]
    teams = sorted({1, threads // 2} - {0, threads}, reverse=True)
    return (Tuning(), *others, *(Tuning(n) for n in teams))


def choose(executor: NativeExecutor, spec: EngineSpec, key: str, use_record: bool) -> str:
    """Set the executor's tuning; gives a line for the report.

    key: names the program and all that the choice depends on, for the record on disk. use_record: take the choice from
    there when it holds one.
    """
    tried = candidates(torch.get_num_threads())
    chosen = remembered(key, len(tried)) if use_record else None
    if chosen is None and is_busy():
        return f"{executor.program.name}: threads and prefetch distance not measured, the machine is busy"
    if chosen is None:
        seconds = _measure(executor, spec, tried)
        chosen = pick(seconds, _CLEARLY)
        remember(key, chosen, seconds)
    executor.tuning = tried[chosen]
    team = tried[chosen].threads or torch.get_num_threads()
    return f"{executor.program.name}: {team} threads, weights prefetched {executor.tuning.prefetch_bytes} bytes ahead"


def is_busy() -> bool:
    """True when other work would be in the figures."""
    return os.getloadavg()[0] > _BUSY * (os.cpu_count() or 1)


def _measure(executor: NativeExecutor, spec: EngineSpec, tried: Sequence[Tuning]) -> list[float]:
    """Seconds of a few decode steps under each tuning, the best of several rounds taken in turns."""
    trial = Trial.step(spec, executor.batch)

    def under(tuning: Tuning) -> Callable[[], None]:
        def run() -> None:
            executor.tuning = tuning
            for _ in range(_STEPS):
                executor.run(trial.inputs, trial.dims, trial.state, trial.outputs)

        return run

    before = executor.tuning
    try:
        return time_in_turns([under(replace(t)) for t in tried], _ROUNDS)
    finally:
        executor.tuning = before
