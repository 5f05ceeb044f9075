"""Finished requests leave their memory, and nothing else, to later ones."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

from tilewright.cache import EngineCache
from tilewright.runtime import idle_states
from tilewright.runtime.engine import Engine
from tilewright.runtime.generate import GenerateOptions, generate
from tilewright.runtime.kv_state import RequestState

from .toy import toy_engine

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])


def used(engine: Engine, batch: int = 1) -> RequestState:
    """A state that has served a padded request, with rubbish where nothing was written."""
    state = engine.new_state(batch)
    mask = torch.ones(batch, 7, dtype=torch.int64)
    mask[:, :3] = 0
    generate(engine, state, IDS.repeat(batch, 1), GenerateOptions(20), attention_mask=mask)
    for buffer in state.buffers.values():
        buffer.fill_(torch.nan)
    return state


def test_a_later_request_in_the_same_state_is_as_in_a_new_one() -> None:
    engine = toy_engine()
    expected = generate(engine, engine.new_state(1), IDS, GenerateOptions(20))
    state = used(engine)
    engine.give_back(state)
    again = engine.new_state(1)
    assert again is state
    assert torch.equal(generate(engine, again, IDS, GenerateOptions(20)), expected)


def test_a_state_goes_to_its_bucket_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = toy_engine()
    small, large = used(engine), used(engine, 3)
    engine.give_back(small)
    engine.give_back(large)
    assert engine.new_state(2) is large
    monkeypatch.setattr(idle_states, "stream_number", lambda _: 1)
    assert engine.new_state(1) is not small


def test_few_are_kept_and_the_oldest_goes_first() -> None:
    engine = toy_engine()
    states = [engine.new_state(1) for _ in range(6)]
    for state in states:
        engine.give_back(state)
    assert [engine.new_state(1) for _ in range(4)] == states[:1:-1]
    assert engine.new_state(1) not in states


def test_a_cache_gives_its_state_back_with_its_last_copy() -> None:
    engine = toy_engine()
    cache = EngineCache(engine)
    state = cache.state_for(1)
    shared, twin = copy.copy(cache), copy.deepcopy(cache)
    del cache
    gc.collect()
    assert len(engine.idle) == 0
    assert shared.state is state
    assert twin.state is not state
    shared.reset()
    assert engine.new_state(1) is state


def test_idle_states_make_room_when_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = toy_engine()
    engine.give_back(engine.new_state(1))
    real, full = RequestState.__init__, [True]

    def allocate(self: RequestState, *args: Any) -> None:
        if full and full.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, *args)

    monkeypatch.setattr(RequestState, "__init__", allocate)
    assert engine.new_state(3).rows == 4
    assert len(engine.idle) == 0
    full.append(True)
    with pytest.raises(torch.OutOfMemoryError):
        engine.new_state(3)


def test_a_step_that_finds_memory_full_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = toy_engine()
    expected = engine.step(engine.new_state(1), IDS)
    state, executor, full = engine.new_state(1), engine.prefill_executor, [True]
    run = executor.run

    def once_full(*args: Any) -> None:
        if full and args[1]["T"] == 7:
            full.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(*args)

    monkeypatch.setattr(executor, "run", once_full)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step(state, IDS)
    full.append(True)
    engine.give_back(engine.new_state(1))
    assert torch.equal(engine.step(state, IDS), expected)
