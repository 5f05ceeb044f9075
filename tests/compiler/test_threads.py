"""The C++ backend's team of threads: any size, several callers, a forked process, fewer processors than threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tilewright as tw
from tests.compiler.models import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fast() -> Any:
    return tw.compile(tiny("llama"), backend="cpp", max_length=64, autotune="off")


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def answer(fast: Any) -> Tensor:
    return fast.generate(torch.arange(3, 15)[None], max_new_tokens=12, do_sample=False)


def test_the_team_may_grow_and_shrink(fast: Any) -> None:
    """Threads that outlive a larger team and answer for one they are not on; more threads than processors."""
    torch.set_num_threads(1)
    alone = answer(fast)
    for threads in (2, 5, 1, 3, 2):
        torch.set_num_threads(threads)
        assert torch.equal(answer(fast), alone), threads


def test_callers_take_turns(fast: Any) -> None:
    """Two Python threads whose steps mix in one team."""
    torch.set_num_threads(2)
    alone = answer(fast)
    found: list[Tensor] = []
    callers = [threading.Thread(target=lambda: found.append(answer(fast))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    assert all(torch.equal(tokens, alone) for tokens in found)


SCRIPT = """
import os, sys
import torch
from tests.compiler.test_threads import answer, tiny, tw
torch.set_num_threads(2)
fast = tw.compile(tiny("llama"), backend="cpp", max_length=64, autotune="off")
before = answer(fast)
{body}
"""
FORK = """
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(answer(fast), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(answer(fast), before)
"""
PINNED = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
assert torch.equal(answer(fast), before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks and affinity masks as Linux has them")
@pytest.mark.parametrize("body", [FORK, PINNED], ids=["fork", "pinned"])
def test_processes(body: str) -> None:
    """A child that waits for threads which only its parent has; two threads that share one processor."""
    script = SCRIPT.replace("{body}", body)
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
