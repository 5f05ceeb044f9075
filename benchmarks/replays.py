"""Seconds of each kernel of a decode step as it is replayed, where kernels overlap: from the end of the one before it
to its own, as the profiler saw them. With events around launches no kernel would start before the last has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tilewright.ir.program import KernelBuildError, Program
from tilewright.runtime.executor import Executor
from tilewright.trials import Trial

_BEFORE = 4  # runs that compile, load and record
_RUNS = 6


def replayed_seconds(program: Program, executor: Executor, trial: Trial) -> dict[str, float]:
    """Of each kernel of a program on a GPU, the median; infinite for all of them where one does not run."""
    names = [step.name for step, _, _ in program.trace()]
    try:
        for _ in range(_BEFORE):
            executor.run(trial.inputs, trial.dims, trial.state, trial.outputs)
    except KernelBuildError:
        return dict.fromkeys(names, float("inf"))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(_RUNS):
            executor.run(trial.inputs, trial.dims, trial.state, trial.outputs)
        torch.cuda.synchronize()
    return by_kernel(names, kernel_ends(seen.events(), names))


def kernel_ends(events: Iterable[Any], names: Sequence[str]) -> list[tuple[str, float]]:
    """Of the profiler's events, the kernels with these names, and the seconds at which they ended."""
    ours = set(names)
    # The enum's members are made anew for every event, so none of them *is* another.
    seen = (e for e in events if e.device_type == DeviceType.CUDA and e.name in ours)
    return [(e.name, e.time_range.end * 1e-6) for e in seen]


def by_kernel(names: Sequence[str], ends: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Median seconds of each kernel of whole runs, in the order of ``names``. ends: kernels, and when they ended.

    The first kernel of a run has none before it; its seconds are from the end of the run before. Raises ValueError for
    kernels that are not those of runs.
    """
    ordered = sorted(ends, key=lambda pair: pair[1])
    if not ordered or [name for name, _ in ordered] != list(names) * (len(ordered) // len(names)):
        raise ValueError("the profiler saw other kernels than the program has")
    found: dict[str, list[float]] = {}
    for (_, before), (name, after) in pairwise(ordered):
        found.setdefault(name, []).append(after - before)
    return {name: median(seconds) for name, seconds in found.items()}
