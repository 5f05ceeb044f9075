"""Seconds of each step of a program, for tuning."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import torch

from tilewright.ir.program import KernelBuildError

NamedStep = tuple[str, Callable[[], None]]
"""A step's kernel, "" for a PyTorch call, and a function that runs it."""

_HEAD_START = 100_000  # clock cycles, about 50 microseconds, in which the host queues one launch


def cuda_seconds(steps: Sequence[NamedStep]) -> list[float]:
    """Seconds on the device, by events around each launch; infinity, with a warning, for a kernel that does not run.

    The device sleeps until everything is queued, so that it never waits for the host between two events.
    """
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in steps]
    failed = []
    refused: set[str] = set()
    torch.cuda._sleep(_HEAD_START * len(steps))
    for (name, run), (before, after) in zip(steps, marks, strict=True):
        before.record()
        failed.append(not _survives(name, run, refused))
        after.record()
    torch.cuda.synchronize()
    return [
        float("inf") if bad else before.elapsed_time(after) / 1e3
        for bad, (before, after) in zip(failed, marks, strict=True)
    ]


def wall_seconds(steps: Sequence[NamedStep]) -> list[float]:
    """Seconds that each step takes the host, for launches that return when they are done; as :func:`cuda_seconds`."""
    refused: set[str] = set()
    seconds = []
    for name, run in steps:
        start = time.perf_counter()
        seconds.append(time.perf_counter() - start if _survives(name, run, refused) else float("inf"))
    return seconds


def _survives(name: str, run: Callable[[], None], refused: set[str]) -> bool:
    """Run a step. False, with a warning, where its kernel does not run. refused: kernels that did not, which are not
    tried again."""
    if name in refused:
        return False
    try:
        run()
    except KernelBuildError as error:
        refused.add(name)
        warnings.warn(str(error), stacklevel=2)
        return False
    return True
