"""Continuous batching: every request has the tokens that it would have alone, and its troubles are its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright.ir.program import InputError
from tilewright.runtime.continuous import ContinuousBatch, Sequence
from tilewright.runtime.engine import Engine
from tilewright.runtime.generate import generate
from tilewright.runtime.sampling import GenerateOptions, Sampling

from .toy import VOCAB, ToyExecutor, toy_engine

LENGTH = 32
SECONDS = 20


@contextmanager
def running(engine: Engine) -> Iterator[ContinuousBatch]:
    batch = ContinuousBatch(engine, threads=1)
    try:
        yield batch
    finally:
        batch.close()


def alone(ids: Tensor, options: GenerateOptions, **more: Any) -> Tensor:
    engine = toy_engine((1,), LENGTH)
    return generate(engine, engine.new_state(1), ids, options, **more)


class Held:
    """A streamer that has the batch wait at its first token until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.tolist()
        self.reached.set()
        assert self.go_on.wait(SECONDS)

    def end(self) -> None:
        self.ended = True


class Leaving:
    """A streamer whose client goes away after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("gone")

    def end(self) -> None:
        raise AssertionError("not reached")


requests = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LENGTH - 1),
    st.integers(1, LENGTH),
    st.sets(st.integers(0, VOCAB - 1), max_size=8),
    st.sampled_from([0, 12]),
)


@settings(deadline=None)
@given(st.lists(requests, min_size=1, max_size=9), st.sampled_from([(1,), (1, 2), (4,), (1, 2, 4)]))
def test_each_request_has_the_tokens_that_it_has_alone(
    asked: list[tuple[list[int], int, set[int], int]], buckets: tuple[int, ...]
) -> None:
    with running(toy_engine(buckets, LENGTH)) as batch:
        answers = []
        for prompt, new, ends, least in asked:
            ids = torch.tensor([prompt])
            options = GenerateOptions(min(LENGTH, len(prompt) + new), tuple(ends), 0, min_length=least)
            answers.append((ids, options, batch.submit(Sequence(ids, options))))
        for ids, options, answer in answers:
            assert torch.equal(answer.result(SECONDS), alone(ids, options))


def test_requests_that_come_while_others_run_share_their_steps() -> None:
    engine = toy_engine((1, 2), LENGTH)
    ids, more, options = torch.tensor([[3, 1, 4]]), torch.tensor([[1, 4]]), GenerateOptions(LENGTH)
    first = Held()
    with running(engine) as batch:
        answers = [batch.submit(Sequence(ids, options, streamer=first))]
        assert first.reached.wait(SECONDS)
        answers.append(batch.submit(Sequence(more, options)))
        first.go_on.set()
        found = [answer.result(SECONDS) for answer in answers]
    assert [torch.equal(f, alone(i, options)) for f, i in zip(found, (ids, more), strict=True)] == [
        True,
        True,
    ]
    assert first.ended
    assert first.tokens == found[0][0, 3:].tolist()
    steps = {rows: len(executor.chunks) for rows, executor in engine.decode_executors.items()}  # type: ignore[attr-defined]
    assert steps == {1: 3, 2: 27}  # alone before the second joins, and after the first has ended


def test_a_long_prompt_lets_others_step_between_its_pieces() -> None:
    engine = toy_engine((1, 2), LENGTH, chunk=3)
    order: list[tuple[str, int]] = []

    def watched(executor: ToyExecutor) -> Callable[..., None]:
        run = executor.run

        def noted(inputs: Mapping[str, Tensor], dims: Mapping[str, int], *rest: Any) -> None:
            order.append((executor.phase, dims["S"]))
            run(inputs, dims, *rest)

        return noted

    for executor in (engine.prefill_executor, *engine.decode_executors.values()):
        executor.run = watched(executor)  # type: ignore[method-assign,arg-type]
    first = Held()
    with running(engine) as batch:
        one = batch.submit(Sequence(torch.tensor([[1, 2]]), GenerateOptions(LENGTH), streamer=first))
        assert first.reached.wait(SECONDS)
        other = batch.submit(Sequence(torch.arange(12).unsqueeze(0), GenerateOptions(13)))
        first.go_on.set()
        assert torch.equal(other.result(SECONDS), alone(torch.arange(12).unsqueeze(0), GenerateOptions(13)))
        one.result(SECONDS)
    assert order[:9] == [("prefill", 2), *[("decode", 1), ("prefill", 3)] * 4]


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_client_that_leaves_takes_no_other_along(after: int) -> None:
    ids, options = torch.tensor([[3, 1, 4]]), GenerateOptions(LENGTH)
    with running(toy_engine((1, 2, 4), LENGTH)) as batch:
        answers = [batch.submit(Sequence(ids, options)) for _ in range(2)]
        left = batch.submit(Sequence(ids[:, :2], options, streamer=Leaving(after)))
        with pytest.raises(ConnectionError, match="gone"):
            left.result(SECONDS)
        assert all(torch.equal(a.result(SECONDS), alone(ids, options)) for a in answers)


def test_a_step_that_fails_ends_those_that_run_and_the_batch_goes_on() -> None:
    engine = toy_engine((1,), LENGTH)
    decode = engine.decode_executors[1]
    ids, options = torch.tensor([[3, 1, 4]]), GenerateOptions(LENGTH)
    run = decode.run

    def failing(*args: Any) -> None:
        decode.run = run  # type: ignore[method-assign]
        raise RuntimeError("out of memory")

    decode.run = failing  # type: ignore[method-assign]
    with running(engine) as batch:
        with pytest.raises(RuntimeError, match="out of memory"):
            batch.submit(Sequence(ids, options)).result(SECONDS)
        assert torch.equal(batch.submit(Sequence(ids, options)).result(SECONDS), alone(ids, options))


def test_what_does_not_fit_is_refused_at_once_and_a_bad_prompt_alone_fails() -> None:
    with running(toy_engine((2,), LENGTH)) as batch:
        with pytest.raises(InputError, match="do not fit max_length=32"):
            batch.submit(Sequence(torch.tensor([[1]]), GenerateOptions(LENGTH + 1)))
        with pytest.raises(InputError, match="has 2 tokens already"):
            batch.submit(Sequence(torch.tensor([[1, 2]]), GenerateOptions(2)))
        bad = batch.submit(Sequence(torch.tensor([[VOCAB]]), GenerateOptions(4)))
        good = batch.submit(Sequence(torch.tensor([[1]]), GenerateOptions(4)))
        with pytest.raises(InputError, match="out of range"):
            bad.result(SECONDS)
        assert torch.equal(good.result(SECONDS), alone(torch.tensor([[1]]), GenerateOptions(4)))


def test_sampling_draws_what_it_draws_alone_whoever_else_runs() -> None:
    ids = torch.tensor([[3, 1, 4]])
    options = GenerateOptions(LENGTH, sampling=Sampling(temperature=1.3, top_k=20))
    torch.manual_seed(11)
    wanted = alone(ids, options)
    with running(toy_engine((4,), LENGTH)) as batch:
        torch.manual_seed(11)
        answers = [batch.submit(Sequence(ids, options)) for _ in range(4)]
        found = [a.result(SECONDS).tolist() for a in answers]
    assert found[0] == wanted.tolist()
    assert len({str(f) for f in found}) == 4


def test_a_prompt_that_has_been_run_joins_with_its_state() -> None:
    engine = toy_engine((1, 2), LENGTH)
    ids, options = torch.tensor([[3, 1, 4, 1, 5]]), GenerateOptions(LENGTH)
    state, moved = engine.new_state(1), threading.Event()
    logits = engine.step(state, ids, keep=1)
    with running(engine) as batch:
        other = batch.submit(Sequence(ids[:, :3], options))
        one = batch.submit(Sequence(ids, options, state=state, logits=logits, moved=moved.set))
        assert torch.equal(one.result(SECONDS), alone(ids, options))
        assert torch.equal(other.result(SECONDS), alone(ids[:, :3], options))
    assert moved.is_set()


def test_closing_tells_those_who_wait_and_frees_the_engine() -> None:
    engine = toy_engine((1,), LENGTH)
    first = Held()
    batch = ContinuousBatch(engine, threads=1)
    ids, options = torch.tensor([[3, 1, 4]]), GenerateOptions(LENGTH)
    answers = [
        batch.submit(Sequence(ids, options, streamer=first)),
        *(batch.submit(Sequence(ids, options)) for _ in "ab"),
    ]
    assert first.reached.wait(SECONDS)
    assert answers[2].cancel()
    closing = threading.Thread(target=batch.close)
    closing.start()
    first.go_on.set()
    closing.join()
    for answer in answers[:2]:
        with pytest.raises(RuntimeError, match="closed"):
            answer.result(SECONDS)
    with pytest.raises(RuntimeError, match="closed"):
        batch.submit(Sequence(ids, options))
    assert torch.equal(generate(engine, engine.new_state(1), ids, options), alone(ids, options))
    batch.close()


def test_steps_of_others_come_in_between() -> None:
    """A loop of transformers in another thread, which runs the engine step by step, and the batch take turns."""
    engine = toy_engine((1,), LENGTH)
    ids = torch.tensor([[3, 1, 4]])
    with running(engine) as batch:
        answer = batch.submit(Sequence(ids, GenerateOptions(LENGTH)))
        state = engine.new_state(1)
        with engine.turns:
            logits = engine.step(state, ids)[:, -1]
        for _ in range(10):
            logits = engine.step(state, logits.argmax(-1, keepdim=True))[:, -1]
        assert state.length == 13
        assert torch.equal(answer.result(SECONDS), alone(ids, GenerateOptions(LENGTH)))
