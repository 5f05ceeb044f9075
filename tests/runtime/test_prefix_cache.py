"""Beginnings of prompts that are known: used as far as they may be, and never for another sequence or other weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright.runtime import continuous
from tilewright.runtime.continuous import ContinuousBatch
from tilewright.runtime.engine import Engine
from tilewright.runtime.executor import RecurrentSlot
from tilewright.runtime.kv_state import RequestState
from tilewright.runtime.prefix_cache import KnownSequence, PrefixCache
from tilewright.runtime.sampling import GenerateOptions

from .test_continuous import LENGTH, SECONDS, Held, alone
from .toy import ToyExecutor, toy_engine

EACH = 2 * 8  # bytes of the toy's state per token


def tokens_of(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def known(engine: Engine, ids: Sequence[int], weights: object = None) -> KnownSequence:
    """A sequence that was run by itself."""
    state = engine.new_state(1)
    engine.step(state, torch.tensor([ids]))
    return KnownSequence(tokens_of(*ids), weights, functools.partial(state.row, 0, 0, len(ids)))


def recurrent_engine() -> Engine:
    """The toy with a recurrent layer beside its keys, which its executors leave alone."""
    engine = toy_engine((1,), LENGTH)
    slot = RecurrentSlot("memory", (3,), torch.float64)
    spec = engine.spec.__class__(**{**vars(engine.spec), "recurrent": (slot,)})
    return Engine([ToyExecutor("decode", 1)], ToyExecutor("prefill", 0), spec)


def history(state: RequestState) -> list[int]:
    return state.buffers["history"][0, 0, : state.length, 0].long().tolist()


def test_the_longest_common_beginning_is_copied_and_the_last_token_left_to_run() -> None:
    engine = toy_engine((1,), LENGTH)
    cache = PrefixCache(engine, 1 << 20)
    for ids in ([1, 2, 3], [1, 2, 3, 4, 5], [1, 9]):
        cache.keep(known(engine, ids))
    for prompt, held in (
        ([1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4, 8, 9], 4),
        ([1, 9, 9], 2),
        ([1], 0),
        ([7, 1], 0),
    ):
        state = engine.new_state(1)
        assert cache.begin(state, tokens_of(*prompt)) == held
        assert history(state) == prompt[:held]
        assert state.length == held
    assert cache.reused == 10


def test_a_sequence_takes_the_place_of_those_that_it_continues() -> None:
    engine = toy_engine((1,), LENGTH)
    cache = PrefixCache(engine, 1 << 20)
    for ids, count in (([1, 2], 1), ([1, 2, 3], 1), ([1, 5], 2), ([1, 2], 2), ([1, 5], 2), ([1, 5, 6], 2)):
        cache.keep(known(engine, ids))
        assert len(cache) == count


def test_what_a_recurrent_layer_remembers_stands_for_all_tokens_and_no_fewer() -> None:
    engine = recurrent_engine()
    cache = PrefixCache(engine, 1 << 20)
    for n, ids in enumerate(([1, 2], [1, 2, 3])):
        one = known(engine, ids)
        one.parts()["memory"].fill_(n + 1)
        cache.keep(one)
    assert len(cache) == 2
    for prompt, held, memory in (
        ([1, 2, 4], 2, 1.0),
        ([1, 2, 3, 4], 3, 2.0),
        ([1, 2], 0, 0.0),
        ([1, 7], 0, 0.0),
    ):
        state = engine.new_state(1)
        assert cache.begin(state, tokens_of(*prompt)) == held
        assert state.buffers["memory"].unique().tolist() == [memory]
        assert history(state) == prompt[:held]


def test_memory_is_bounded_and_what_was_not_used_for_longest_goes_first() -> None:
    engine = toy_engine((1,), LENGTH)
    cache = PrefixCache(engine, 6 * EACH)
    for ids in ([1, 1, 1], [2, 2, 2]):
        cache.keep(known(engine, ids))
    assert cache.begin(engine.new_state(1), tokens_of(1, 1, 1, 1)) == 3
    cache.keep(known(engine, [3, 3, 3]))
    found = [cache.begin(engine.new_state(1), tokens_of(n, n, n, n)) for n in (1, 2, 3)]
    assert found == [3, 0, 3]
    cache.keep(known(engine, [4] * 7))  # more than there may be at all
    assert cache.begin(engine.new_state(1), tokens_of(*[4] * 8)) == 0
    assert cache.begin(engine.new_state(1), tokens_of(1, 1, 1, 1)) == 3  # and the others stay


def test_zero_bytes_know_of_nothing_not_even_of_what_runs() -> None:
    engine = toy_engine((1,), LENGTH)
    cache, one = PrefixCache(engine, 0), known(engine, [1, 2])
    cache.keep(one)
    assert len(cache) == 0
    assert cache.begin(engine.new_state(1), tokens_of(1, 2, 3), running=[one]) == 0


def test_sequences_of_other_weights_are_others() -> None:
    engine = toy_engine((1,), LENGTH)
    cache = PrefixCache(engine, 1 << 20)
    cache.keep(known(engine, [1, 2], weights=1))
    cache.keep(known(engine, [1, 2, 3], weights=2))
    assert len(cache) == 2
    assert [cache.begin(engine.new_state(1), tokens_of(1, 2, 3, 4), w) for w in (1, 2, 3)] == [2, 3, 0]


def test_nothing_is_kept_where_memory_is_full() -> None:
    engine = toy_engine((1,), LENGTH)
    cache = PrefixCache(engine, 1 << 20)
    cache.keep(known(engine, [1, 2]))

    class Full:
        nbytes = 8

        def clone(self) -> Tensor:
            raise RuntimeError("CUDA error: out of memory")

    cache.keep(KnownSequence(tokens_of(5), None, lambda: {"history": Full()}))  # type: ignore[dict-item]
    assert len(cache) == 0


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=LENGTH - 1)


@settings(deadline=None)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 6), st.booleans()), min_size=2, max_size=12),
    st.sampled_from([1, 2]),
    st.sampled_from([20 * EACH, 1 << 20]),
)
def test_requests_that_begin_alike_have_the_tokens_that_they_have_alone(
    asked: list[tuple[list[int], int, bool]], rows: int, nbytes: int
) -> None:
    """Many of two tokens do; some come while others run, some when these have ended."""
    batch = ContinuousBatch(toy_engine((1, 2)[:rows], LENGTH), 1, nbytes)
    try:
        answers = []
        for prompt, new, waits in asked:
            ids = torch.tensor([prompt])
            options = GenerateOptions(min(LENGTH, len(prompt) + new))
            answers.append((ids, options, batch.submit(continuous.Sequence(ids, options))))
            if waits:
                answers[-1][2].result(SECONDS)
        for ids, options, answer in answers:
            assert torch.equal(answer.result(SECONDS), alone(ids, options))
    finally:
        batch.close()


def ran(engine: Engine) -> int:
    """Tokens of prompts that were run."""
    return sum(engine.prefill_executor.chunks)  # type: ignore[attr-defined]


def test_a_conversation_runs_what_is_new_of_each_turn() -> None:
    engine = toy_engine((1, 2), LENGTH)
    batch = ContinuousBatch(engine, 1)
    try:
        said = torch.tensor([[3, 1, 4, 1, 5]])
        for turn in range(3):
            options = GenerateOptions(said.shape[1] + 4)
            answer = batch.submit(continuous.Sequence(said, options)).result(SECONDS)
            assert torch.equal(answer, alone(said, options))
            said = torch.cat([answer, torch.tensor([[turn, 7]])], dim=1)
        assert ran(engine) == 5 + 3 + 3  # the last token of an answer has not been run either
        assert batch.prefixes.reused == 8 + 14
    finally:
        batch.close()


def test_what_runs_gives_its_beginning_to_what_comes() -> None:
    engine = toy_engine((1, 2), LENGTH)
    batch = ContinuousBatch(engine, 1)
    try:
        first, ids = Held(), torch.tensor([[3, 1, 4, 1, 5, 9]])
        one = batch.submit(continuous.Sequence(ids, GenerateOptions(LENGTH), streamer=first))
        assert first.reached.wait(SECONDS)
        more = torch.tensor([[3, 1, 4, 1, 2, 2]])
        other = batch.submit(continuous.Sequence(more, GenerateOptions(10)))
        first.go_on.set()
        assert torch.equal(other.result(SECONDS), alone(more, GenerateOptions(10)))
        assert torch.equal(one.result(SECONDS), alone(ids, GenerateOptions(LENGTH)))
        assert ran(engine) == 6 + 2
    finally:
        batch.close()


@pytest.mark.parametrize("positions", [torch.arange(5).unsqueeze(0), torch.tensor([[0, 0, 1, 2, 3]])])
def test_positions_of_ones_own_are_used_and_share_nothing(positions: Tensor) -> None:
    engine = toy_engine((1,), LENGTH)
    batch, ids = ContinuousBatch(engine, 1), torch.tensor([[3, 1, 4, 1, 5]])
    plain = bool((positions == torch.arange(5)).all())
    try:
        for _ in range(2):
            request = continuous.Sequence(ids, GenerateOptions(9), position_ids=positions)
            answer = batch.submit(request).result(SECONDS)
            assert torch.equal(answer, alone(ids, GenerateOptions(9), position_ids=positions))
        assert batch.prefixes.reused == (4 if plain else 0)
    finally:
        batch.close()


def test_a_prompt_that_finds_memory_full_is_run_again_without_what_can_be_spared() -> None:
    engine = toy_engine((1,), LENGTH)
    batch = ContinuousBatch(engine, 1)
    ids, options = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), GenerateOptions(12)
    run, failures = engine.prefill_executor.run, [1]

    def failing(*args: Any) -> None:
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("out of memory")
        run(*args)

    try:
        assert batch.submit(continuous.Sequence(ids[:, :3], options)).result(SECONDS).shape[1] == 12
        engine.prefill_executor.run = failing  # type: ignore[method-assign]
        answer = batch.submit(continuous.Sequence(ids, options))
        assert torch.equal(answer.result(SECONDS), alone(ids, options))
        assert batch.prefixes.reused == 3
        failures[0] = 2  # once with what can be spared, once without: it says so then
        with pytest.raises(RuntimeError, match="out of memory"):
            batch.submit(continuous.Sequence(ids[:, 1:], options)).result(SECONDS)
    finally:
        batch.close()
    assert not engine.idle.others
