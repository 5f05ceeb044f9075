"""Kernel by kernel: every step of a program is timed, and costs are those of the program."""

from __future__ import annotations

import pytest
import torch

import tilewright as tw
from benchmarks import kernels, models
from benchmarks.kernels import Clock, Phase
from tilewright.costs import program_cost


@pytest.mark.parametrize("phase", list(Phase))
def test_every_kernel_of_a_program_is_timed(phase: Phase) -> None:
    source = models.tiny_llama(torch.float32)
    fast = tw.compile(source, backend="cpp")
    runs = kernels.prepare(fast, models.prompt(source, 16), phase)
    times = kernels.kernel_times(runs, 2, Clock.wall)
    assert sum(len(t.seconds) for t in times) == fast.report().phase(phase.value).launches
    program = runs.executor.program
    assert program.phase == phase.value
    assert sum(t.cost.bytes * len(t.seconds) for t in times) == program_cost(program, runs.dims).bytes
    assert "self_attn" in " ".join(t.module for t in times)
    shown = kernels.table(times, bandwidth=1e9, title="")
    assert shown.row_count == len(times) == len({t.name for t in times})
