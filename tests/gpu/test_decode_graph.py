"""Decode steps on a real GPU: recorded once per state of a bucket, and the same tokens as Hugging Face's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tilewright as tw
from tests.compiler.models import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    model = tiny("llama").to("cuda")
    return model, tw.compile(model, batch_sizes=(1, 3), max_length=128)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_replayed_steps_give_hugging_faces_tokens(batch: int, pair: tuple[Any, Any]) -> None:
    """Forty steps, of which all but the first few are replays, with a left-padded row."""
    model, fast = pair
    ids = torch.randint(3, 128, (batch, 9), device="cuda")
    mask = torch.ones_like(ids)
    mask[-1, :4] = 0
    given = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids, **given), model.generate(ids, **given))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "how", [{"top_k": 0}, {"top_k": 20}, {"top_k": 30, "top_p": 0.8, "temperature": 1.3}]
)
@pytest.mark.parametrize("ends", [False, True])
def test_replayed_draws_are_hugging_faces(
    ends: bool, how: dict[str, Any], batch: int, pair: tuple[Any, Any]
) -> None:
    """Sampling inside the recording, with one seed; and what is drawn next is the same too, ends or not."""
    model, fast = pair
    ids = torch.randint(3, 128, (batch, 9), device="cuda")
    given = {"max_new_tokens": 30, "do_sample": True, "pad_token_id": 0, **how}
    if ends:
        given["eos_token_id"] = list(range(3, 30))
    results = []
    for each in (model, fast):
        torch.manual_seed(5)
        results.append((each.generate(ids, **given), torch.rand(4, device="cuda")))
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)


def test_whole_steps_are_recorded(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording for many calls, which holds the choice too; the executor makes none of its own."""
    from tilewright.runtime import generate, triton_executor

    _, fast = pair
    counts = {"whole": 0, "model": 0}

    def counted(name: str, record: Any) -> Any:
        def recorder(*arguments: Any) -> Any:
            counts[name] += 1
            return record(*arguments)

        return recorder

    monkeypatch.setattr(generate, "_record_step", counted("whole", generate._record_step))
    monkeypatch.setattr(triton_executor, "record", counted("model", triton_executor.record))
    ids = torch.randint(3, 128, (1, 9), device="cuda")
    engine = fast._tilewright.engine
    engine.idle.make_room()
    for tokens in (20, 5, 30):
        fast.generate(ids[:, :tokens], max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    assert counts == {"whole": 1, "model": 0}


def test_memory_stays_level_over_many_calls(pair: tuple[Any, Any]) -> None:
    _, fast = pair
    ids = torch.randint(3, 128, (3, 9), device="cuda")
    ways: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True, "top_p": 0.9}]
    reserved = []
    for _ in range(20):
        for way in ways:
            fast.generate(ids, max_new_tokens=12, pad_token_id=0, **way)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[2] == reserved[-1]


def test_a_request_is_recorded_once(pair: tuple[Any, Any]) -> None:
    """The third step and all after it run from the recording, which a new context length does not void."""
    _, fast = pair
    engine = fast._tilewright.engine
    engine.idle.make_room()  # a state that has served a request has its recording already
    state = engine.new_state(1)
    engine.step(state, torch.randint(3, 128, (1, 5), device="cuda"))
    executor = engine.decode_executors[1]
    replays = set()
    for _ in range(6):
        engine.advance(state)
        bound = state.scratch[executor]
        replays.add(bound.replay)
    assert bound.replay is not None
    assert len(replays) == 2  # none at first, then always the same


def test_steps_are_timed_on_the_device(pair: tuple[Any, Any]) -> None:
    from tilewright.trials import Trial

    _, fast = pair
    engine = fast._tilewright.engine
    executor = engine.decode_executors[3]
    trial = Trial.step(engine.spec, 3)
    seconds = executor.step_seconds(trial.inputs, trial.dims, trial.state, trial.outputs)
    assert all(0 < s < 1 for s in seconds)
