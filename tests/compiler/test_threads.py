"""The C++ backend's team of threads: any size, several callers, a forked process, fewer processors than threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tilewright as tw
from tests.compiler.models import tiny

ROOT = Path(__file__).parents[2]


OPTIONS: dict[str, Any] = {"backend": "cpp", "max_length": 64, "autotune": "off"}


@pytest.fixture(scope="module")
def fast() -> Any:
    return tw.compile(tiny("llama"), batch_sizes=(1, 4), **OPTIONS)


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


class Collect:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ends += 1


def padded(rows: int, length: int) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(rows + length))
    skipped = torch.arange(length) < torch.arange(rows)[:, None]
    return {"input_ids": ids.masked_fill(skipped, 0), "attention_mask": (~skipped).long()}


MODES: dict[str, dict[str, Any]] = {
    "one": padded(1, 5),
    "long": padded(1, 40),
    "rows": padded(3, 9),
    "full": padded(4, 20),
    "eos": {**padded(4, 7), "eos_token_id": list(range(20, 60))},
    "beams": {**padded(2, 8), "num_beams": 2},
    "processors": {**padded(2, 6), "repetition_penalty": 1.4},
    "lookup": {"input_ids": padded(1, 5)["input_ids"].repeat(1, 3), "prompt_lookup_num_tokens": 3},
}


def streamed(model: Any, mode: str) -> tuple[Tensor, list[int]]:
    """A mode's tokens, and what its streamer is given, where transformers lets it have one."""
    options = MODES[mode]
    streamer = Collect() if len(options["input_ids"]) == 1 else None
    given: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    tokens = model.generate(streamer=streamer, **given)
    if streamer is None:
        return tokens, []
    assert streamer.ends == 1
    return tokens, streamer.tokens


def at_once(fast: Any, modes: Sequence[str], rounds: int = 3) -> list[tuple[str, Tensor, list[int]]]:
    """What one thread per mode, started together, gets in so many rounds."""
    found: list[tuple[str, Tensor, list[int]]] = []
    barrier = threading.Barrier(len(modes))

    def work(mode: str) -> None:
        barrier.wait(timeout=60)
        for _ in range(rounds):
            found.append((mode, *streamed(fast, mode)))

    callers = [threading.Thread(target=work, args=(mode,)) for mode in modes]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return found


def assert_as_alone(found: Sequence[tuple[str, Tensor, list[int]]]) -> None:
    """Equal to what the original gives, one call after the other."""
    original = tiny("llama")
    alone = {mode: streamed(original, mode) for mode in MODES}
    for mode, tokens, stream in found:
        assert torch.equal(tokens, alone[mode][0]), mode
        assert stream == alone[mode][1], mode


def test_requests_of_every_kind_at_once(fast: Any) -> None:
    """Batches, prompts, loops and streams that mix: states, scratch memory and idle states are each request's own."""
    torch.set_num_threads(1)
    found = at_once(fast, list(MODES))
    assert len(found) == 3 * len(MODES)
    assert_as_alone(found)


def test_requests_while_another_model_is_compiled(fast: Any) -> None:
    """Capture patches transformers for a while and swaps modules; what runs meanwhile must not see it."""
    torch.set_num_threads(1)
    compiled: list[Any] = []
    compiler = threading.Thread(target=lambda: compiled.append(tw.compile(tiny("gpt2"), **OPTIONS)))
    compiler.start()
    found = []
    while compiler.is_alive():
        found += at_once(fast, ["one", "rows", "beams"], rounds=1)
    compiler.join()
    assert found
    assert_as_alone(found)
    torch.testing.assert_close(answer(compiled[0]), answer(tiny("gpt2")))


SCRIPT = """
import os, sys
import torch
from tests.compiler.test_threads import WithTorchStep, tiny, tw
torch.set_num_threads(2)
torch.manual_seed(0)
{setup}
before = answer(fast)
{body}
"""
TURNS = """
x = torch.randn(3, 8, 16)
fast = tw.compile(WithTorchStep().eval(), example_inputs=(x,), backend="cpp")
answer = torch.no_grad()(lambda fast: fast(x))
"""
DECODER = """
fast = tw.compile(tiny("llama"), backend="cpp", max_length=64, autotune="off")
from tests.compiler.test_threads import answer
"""


class WithTorchStep(torch.nn.Module):
    """A convolution, which PyTorch runs, between kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv = torch.nn.Linear(16, 32), torch.nn.Conv1d(8, 8, 3, padding=1)
        self.down = torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.conv(self.up(x).relu()))
        return result


FORK = """
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(answer(fast), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(answer(fast), before)
"""
GROWN = """
for threads in (1, 3, 2):
    torch.set_num_threads(threads)
    assert torch.equal(answer(fast), before), threads
"""
ONE_SET = """
def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
torch.randn(1000, 1000).sin()
alone = threads()
assert torch.equal(answer(fast), before)
assert threads() == alone, (threads(), alone)
"""
NESTED = """
import ctypes
from tilewright.runtime import openmp
CALLED = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
found = []
once = CALLED(lambda data: found.append(answer(fast)))
libgomp = ctypes.CDLL(None)
libgomp.GOMP_parallel(once, None, ctypes.c_uint(2), ctypes.c_uint(0))
assert len(found) == 2 and all(torch.equal(f, before) for f in found)
"""
PINNED = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
assert torch.equal(answer(fast), before)
"""


linux = pytest.mark.skipif(sys.platform != "linux", reason="forks and affinity masks as Linux has them")


def run_alone(body: str, setup: str = TURNS, **environment: str) -> None:
    """Run a script whose OpenMP threads spin, unless ``environment`` says otherwise; then ours are the same."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{body}", body).replace("{setup}", setup)],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


@linux
@pytest.mark.parametrize("policy", ["active", "passive"])
@pytest.mark.parametrize("body", [FORK, PINNED, GROWN], ids=["fork", "pinned", "grown"])
def test_processes(body: str, policy: str) -> None:
    """A child that waits for threads which only its parent has; two threads that share one processor; PyTorch's number
    of threads changed. On PyTorch's threads, and on the library's own, as those of PyTorch sleep."""
    # PyTorch's own operations hang in the child of a fork, where they use its threads.
    run_alone(body, DECODER if body == FORK else TURNS, OMP_WAIT_POLICY=policy)


needs_openmp = pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="PyTorch without OpenMP"
)


@needs_openmp
@pytest.mark.parametrize("body", [ONE_SET, NESTED], ids=["one set", "nested"])
def test_pytorchs_threads(body: str) -> None:
    """Threads beside those that PyTorch has; callers that are members of a region, where a team has one thread."""
    run_alone(body)


@needs_openmp
@pytest.mark.parametrize("limit", ["1", "2"])
def test_a_team_smaller_than_asked(limit: str) -> None:
    """A barrier that counts threads which the OpenMP library did not give."""
    run_alone("torch.set_num_threads(4)\nassert torch.equal(answer(fast), before)", OMP_THREAD_LIMIT=limit)
