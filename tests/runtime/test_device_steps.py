"""Whole decode steps without the host, replayed by a pretended recording, give the tokens of the host's steps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tilewright.runtime.cuda_graph import record
from tilewright.runtime.engine import Engine
from tilewright.runtime.generate import GenerateOptions, generate
from tilewright.runtime.kv_state import RequestState
from tilewright.runtime.sampling import Sampling

from .toy import ToyExecutor, toy_engine

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [2, 7, 18, 28, 18, 28, 45], [1, 1, 2, 3, 5, 8, 13]])
SAMPLED = Sampling(temperature=1.5, top_k=20, top_p=0.9)


class _SteppingToy(ToyExecutor):
    """A toy that counts the context in memory, as decode programs of the Triton backend do."""

    def run(self, inputs: Any, dims: Mapping[str, int], state: RequestState | None, outputs: Any) -> None:
        assert state is not None
        super().run(inputs, dims, state, outputs)
        with torch.inference_mode(False):
            context = state.scratch.setdefault(self, torch.zeros(1, dtype=torch.int32))
        context.fill_(dims["T"])

    def device_step(self, state: RequestState) -> Callable[[], None]:
        context = state.scratch[self]
        context.fill_(state.length)

        def step() -> None:
            with _disable_current_modes():  # a kernel may read its own memory
                context.add_(1)
                dims = {**state.step_dims, "T": int(context)}
                ToyExecutor.run(self, state.step_inputs, dims, state, state.step_outputs)

        return step


class _HostIsAsked(TorchDispatchMode):
    """Fails where an operation makes the host wait for a value, as a recording would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


class _Recorder:
    """Runs nothing when it records; replays outside of inference mode and without a value for the host."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, launches: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            with torch.inference_mode(False), _HostIsAsked():
                launches()

        return replay


def engine() -> Engine:
    plain = toy_engine()
    return Engine([_SteppingToy("decode", b) for b in plain.buckets], plain.prefill_executor, plain.spec)


def both(
    ids: Tensor, options: GenerateOptions, every: int = 8, **more: Any
) -> tuple[Tensor, Tensor, _Recorder]:
    """Tokens by the host's steps and by replayed ones; and the states that they leave agree."""
    recorder, run = _Recorder(), engine()
    states = run.new_state(len(ids)), run.new_state(len(ids))
    torch.manual_seed(7)
    expected = generate(run, states[0], ids, options)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    found = generate(run, states[1], ids, options, look_every=every, recorder=recorder, **more)
    assert torch.equal(torch.get_rng_state(), after)
    assert states[0].length == states[1].length == expected.shape[1] - 1
    again = GenerateOptions(expected.shape[1] + 2)
    if again.max_length <= 32:  # the request goes on as if nothing had happened
        went_on = [generate(run, s, expected, again, held=s.length) for s in states]
        assert torch.equal(*went_on)
    return expected, found, recorder


@pytest.mark.parametrize("every", [1, 2, 3, 8])
@pytest.mark.parametrize("sampling", [None, SAMPLED, Sampling(top_p=0.8), Sampling(top_k=5)])
@pytest.mark.parametrize("batch", [1, 3])
def test_replayed_steps_give_the_hosts_tokens(batch: int, sampling: Sampling | None, every: int) -> None:
    """Without an end, and with ends at many places; the random state is what the host's loop leaves."""
    free, found, recorder = both(IDS[:batch], GenerateOptions(20, sampling=sampling), every)
    assert torch.equal(found, free)
    assert (recorder.recorded, recorder.replayed) == (1, 11)  # of 12 steps of the model one is launched
    for ends in ((9, 12, 10), (7, 7, 7), (9, 19, 10), (8, 8, 11), (7, 14, 8)):
        eos = tuple(int(row[n]) for row, n in zip(free, ends, strict=False))
        expected, found, _ = both(IDS[:batch], GenerateOptions(20, eos, 0, sampling=sampling), every)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("minimum", [8, 11, 15, 30])
@pytest.mark.parametrize("sampling", [None, SAMPLED])
def test_a_minimum_ends_in_the_middle_of_replays(minimum: int, sampling: Sampling | None) -> None:
    free, _, _ = both(IDS, GenerateOptions(20, sampling=sampling))
    eos = tuple({int(t) for t in free[:, 7:11].flatten()})
    options = GenerateOptions(20, eos, 0, min_length=minimum, sampling=sampling)
    expected, found, _ = both(IDS, options, every=3)
    assert torch.equal(found, expected)
    early = expected[:, 7 : min(minimum, 20)]
    assert not torch.isin(early, torch.tensor(eos)).any()


def test_steps_that_ran_in_vain_moved_the_random_state_and_are_taken_back() -> None:
    """A late look at a run that ends early: more replays than tokens, and yet the next draw is the host's."""
    free, _, _ = both(IDS[:1], GenerateOptions(20, sampling=SAMPLED))
    eos = (int(free[0, 8]),)
    expected, found, recorder = both(IDS[:1], GenerateOptions(20, eos, 0, sampling=SAMPLED), every=3)
    assert torch.equal(found, expected)
    assert recorder.replayed + 2 > expected.shape[1] - 7


def test_one_recording_serves_all_requests_of_a_state() -> None:
    """With other prompts, lengths and minima; each way to choose has its own. All steps but the very first replay."""
    run, recorder = engine(), _Recorder()
    state = run.new_state(3)
    free = generate(run, state, IDS, GenerateOptions(20))
    eos = tuple({int(t) for t in free[:, 7:11].flatten()})
    for sampling in (None, SAMPLED):
        for prompt, minimum in ((7, 9), (4, 12), (1, 16), (6, 8)):
            options = GenerateOptions(20, eos, 0, minimum, sampling)
            fresh, before = run.new_state(3), recorder.replayed
            torch.manual_seed(7)
            expected = generate(run, fresh, IDS[:, :prompt], options)
            run.give_back(state)
            assert run.new_state(3) is state
            torch.manual_seed(7)
            assert torch.equal(generate(run, state, IDS[:, :prompt], options, recorder=recorder), expected)
            launched = 1 if prompt == 7 else 0
            assert recorder.replayed - before == expected.shape[1] - prompt - 1 - launched
    assert recorder.recorded == 2


def test_a_state_forgets_the_way_to_choose_used_longest_ago() -> None:
    run, recorder = engine(), _Recorder()
    state = run.new_state(1)
    for k in (2, 3, 4, 5, 2, 6, 2, 3):
        options = GenerateOptions(12, sampling=Sampling(top_k=k))
        state.reset(1)
        generate(run, state, IDS[:1], options, recorder=recorder)
    assert recorder.recorded == 6  # five, and 3 once more, which had to make room for 6


class _Streamer:
    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.steps.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_each_token_and_none_too_many() -> None:
    free, _, _ = both(IDS, GenerateOptions(20))
    eos, streamer = tuple(int(row[10]) for row in free), _Streamer()
    expected, found, _ = both(IDS, GenerateOptions(20, eos, 0), every=1, streamer=streamer)
    assert torch.equal(found, expected)
    assert streamer.steps == expected[:, 7:].T.tolist()
    assert streamer.ended


def test_in_inference_mode_and_with_a_mask() -> None:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    run, recorder = engine(), _Recorder()
    expected = generate(run, run.new_state(3), IDS, GenerateOptions(20), attention_mask=mask)
    with torch.inference_mode():
        found = generate(
            run, run.new_state(3), IDS, GenerateOptions(20), attention_mask=mask, recorder=recorder
        )
    assert torch.equal(found, expected)
    assert recorder.replayed == 11


def test_half_precision_logits_are_compared_in_float32() -> None:
    from tilewright.runtime.device_steps import DeviceSteps

    run = engine()
    state = run.new_state(1)
    state.logits = torch.zeros(1, 1, 50, dtype=torch.bfloat16)
    state.logits[0, 0, 31] = 1.0
    steps = DeviceSteps(run, state, GenerateOptions(4), torch.zeros(1, 2, dtype=torch.int64), 1, None)
    steps.first()
    assert steps.sequences[:, :4].tolist() == [[0, 0, 31, 0]]


@pytest.mark.parametrize("sampling", [None, SAMPLED])
def test_without_a_recording_every_step_is_launched(sampling: Sampling | None) -> None:
    """The recorder refuses, as CUDA does where there is none, with a warning; or the executor has no such steps."""
    options = GenerateOptions(20, sampling=sampling)
    torch.manual_seed(7)
    expected = generate(engine(), engine().new_state(3), IDS, options)
    torch.manual_seed(7)
    with pytest.warns(UserWarning, match="no CUDA graph"):
        found = generate(engine(), engine().new_state(3), IDS, options, recorder=record)
    assert torch.equal(found, expected)
    recorder, plain = _Recorder(), toy_engine()
    torch.manual_seed(7)
    assert torch.equal(generate(plain, plain.new_state(3), IDS, options, recorder=recorder), expected)
    assert recorder.recorded == 0


SCRIPT = """
import torch, tilewright as tw
from tests.compiler.models import tiny
from tests.quick_interpreter import hurry
from tilewright.runtime.generate import GenerateOptions, generate
from tilewright.runtime.sampling import Sampling

hurry()
model = tiny("llama")
engine = tw.compile(model, backend="triton", batch_sizes=(2,), max_length=32)._tilewright.engine
ids = torch.tensor([[5, 17, 99, 23, 42], [7, 8, 9, 10, 11]])
replays = 0

def recorder(launches, device):
    def replay():
        global replays
        replays += 1
        launches()
    return replay

torch.manual_seed(3)
expected = model.generate(ids, max_new_tokens=6, do_sample=True, top_k=20, pad_token_id=0)
torch.manual_seed(3)
options = GenerateOptions(11, sampling=Sampling(top_k=20))
found = generate(engine, engine.new_state(2), ids, options, recorder=recorder)
assert torch.equal(found, expected), (found, expected)
assert engine.greedy is not None
free = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
end = int(free[0, 7])
expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0)
found = generate(engine, engine.new_state(2), ids, GenerateOptions(11, (end,), 0), look_every=3)
assert torch.equal(found, expected), (found, expected)
print(replays)
"""


def test_generated_kernels_count_their_context_in_memory(tmp_path: Path) -> None:
    """Decode steps of the Triton backend, interpreted, against sampling by Hugging Face with the same seed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TILEWRIGHT_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "4", done.stdout + done.stderr
