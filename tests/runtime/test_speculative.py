"""Guessed tokens that are checked several at a time: whatever is guessed, the tokens are those of plain decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewright.ir.program import InputError
from tilewright.runtime.engine import Engine
from tilewright.runtime.generate import generate
from tilewright.runtime.sampling import CustomOptions, GenerateOptions, Sampling
from tilewright.runtime.sequence import Sequence
from tilewright.runtime.speculative import Guess, Payoff, PromptLookup, speculate

from .toy import VOCAB, toy_engine

LENGTH = 32


def plain(ids: Tensor, options: GenerateOptions, **more: Any) -> Tensor:
    engine = toy_engine((1,), LENGTH)
    return generate(engine, engine.new_state(1), ids, options, **more)


def knowing(tokens: Tensor, right: list[bool]) -> Guess:
    """Guesses what comes, by turns rightly and wrongly, three tokens at a time."""
    turns = iter(range(10**6))

    def guess(known: list[int]) -> tuple[list[int], int]:
        coming = tokens[0, len(known) : len(known) + 3].tolist()
        return [t if right[next(turns) % len(right)] else (t + 1) % VOCAB for t in coming], 2

    return guess


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LENGTH - 1)


@settings(deadline=None)
@given(
    prompts,
    st.integers(1, LENGTH),
    st.sets(st.integers(0, VOCAB - 1), max_size=8),
    st.sampled_from([0, 12]),
    st.lists(st.booleans(), min_size=1, max_size=7),
    st.integers(1, 4),
)
def test_tokens_are_those_of_plain_decoding(
    prompt: list[int], new: int, ends: set[int], least: int, right: list[bool], guesses: int
) -> None:
    ids = torch.tensor([prompt])
    options = GenerateOptions(min(LENGTH, len(prompt) + new), tuple(ends), 0, min_length=least)
    wanted = plain(ids, options)
    engine = toy_engine((1,), LENGTH, guesses=guesses)
    state = engine.new_state(1)
    told = Told()
    sequence = Sequence(ids, options, streamer=told)
    assert torch.equal(speculate(engine, state, sequence, knowing(wanted, right)), wanted)
    assert told.tokens == wanted[0, len(prompt) :].tolist()
    assert told.ended
    # What is left is a request like any other: all but the last token have been run.
    assert state.length == wanted.shape[1] - 1
    assert int(state.positions[0, 0]) == wanted.shape[1] - 2


class Told:
    """A streamer that takes one token at a time."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        (token,) = value.tolist()
        self.tokens.append(token)

    def end(self) -> None:
        self.ended = True


def steps(engine: Engine) -> tuple[int, int]:
    """Steps of one token, and of several."""
    return (
        len(engine.decode_executors[1].chunks),  # type: ignore[attr-defined]
        len(engine.verify_executor.chunks),  # type: ignore[union-attr]
    )


def test_right_guesses_save_steps() -> None:
    ids, options = torch.tensor([[3, 1, 4, 1, 5]]), GenerateOptions(5 + 17)
    wanted = plain(ids, options)
    # Of 16 steps with wrong guesses the first two check some.
    for right, expected in (([True], (0, 4)), ([False], (14, 2))):
        engine = toy_engine((1,), LENGTH, guesses=3)
        speculate(engine, engine.new_state(1), Sequence(ids, options), knowing(wanted, right))
        assert steps(engine) == expected


def test_one_guess_at_a_time_goes_on_while_enough_are_right() -> None:
    ids, options = torch.tensor([[3, 1, 4, 1, 5]]), GenerateOptions(LENGTH)
    wanted = plain(ids, options)
    engine = toy_engine((1,), LENGTH, guesses=1)
    asked: list[int] = []

    def guess(known: list[int]) -> tuple[list[int], int]:
        asked.append(len(known))
        right = wanted[0, len(known) : len(known) + 1].tolist()
        return right if len(asked) > 1 else [(t + 1) % VOCAB for t in right], 2

    speculate(engine, engine.new_state(1), Sequence(ids, options), guess)
    assert asked == [6, *range(7, LENGTH, 2)]  # one was wrong, and from then on each step has two tokens


def test_guesses_that_were_wrong_wait_for_every_thirty_second_chance() -> None:
    payoff = Payoff(7)
    for _ in range(2):
        assert payoff.worthwhile(2)
        payoff.learn(2, 0)
    assert [payoff.worthwhile(2) for _ in range(65)] == [n % 32 == 31 for n in range(65)]
    assert payoff.worthwhile(3)  # which is another kind
    payoff.learn(2, 7)
    assert payoff.worthwhile(2)


@given(st.lists(st.tuples(st.integers(2, 4), st.integers(0, 7)), max_size=40))
def test_guesses_that_are_right_often_enough_are_never_left_out(seen: list[tuple[int, int]]) -> None:
    payoff = Payoff(7)
    for kind, right in seen:
        payoff.learn(kind, max(right, 1))
        assert payoff.worthwhile(kind)


def test_a_streamer_that_fails_leaves_no_guess_behind() -> None:
    ids, options = torch.tensor([[3, 1, 4, 1, 5]]), GenerateOptions(LENGTH)
    wanted = plain(ids, options)

    class Failing(Told):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.tokens) == 4:
                raise ConnectionError("gone")

    for right, length in (([False], 8), ([True], 8)):
        engine = toy_engine((1,), LENGTH, guesses=3)
        state = engine.new_state(1)
        with pytest.raises(ConnectionError, match="gone"):
            speculate(engine, state, Sequence(ids, options, streamer=Failing()), knowing(wanted, right))
        assert state.length == length
        history = state.buffers["history"][0, 0, :length, 0].long()
        assert torch.equal(history, wanted[0, :length])


def test_near_the_end_of_the_room_tokens_are_run_one_by_one() -> None:
    ids, options = torch.tensor([[3, 1, 4]]), GenerateOptions(LENGTH)
    wanted = plain(ids, options)
    engine = toy_engine((1,), LENGTH, guesses=4)
    found = speculate(engine, engine.new_state(1), Sequence(ids, options), knowing(wanted, [True]))
    assert torch.equal(found, wanted)
    assert engine.room_for_guesses(engine.new_state(1)) == 4


@pytest.mark.parametrize("how", [Sampling(temperature=1.3, top_k=20), Sampling(top_p=0.8)])
def test_draws_are_those_of_plain_sampling(how: Sampling) -> None:
    ids, options = torch.tensor([[3, 1, 4]]), GenerateOptions(LENGTH, sampling=how)
    torch.manual_seed(11)
    wanted = plain(ids, options)
    for right in ([True, False, True], [True]):
        engine = toy_engine((1,), LENGTH, guesses=3)
        torch.manual_seed(11)
        found = speculate(engine, engine.new_state(1), Sequence(ids, options), knowing(wanted, right))
        assert torch.equal(found, wanted)


def test_processors_and_criteria_see_each_token() -> None:
    def process(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, ids[0], -torch.inf)  # no token twice

    options = CustomOptions(LENGTH, process=process, stops=lambda ids: ids.shape[1] == 14)
    ids, wanted = torch.tensor([[3, 1, 4]]), [3, 1, 4]
    engine = toy_engine((1,), LENGTH)
    state = engine.new_state(1)
    logits = engine.step(state, ids, keep=1)
    while len(wanted) < 14:
        wanted.append(int(process(torch.tensor([wanted]), logits[:, -1]).argmax()))
        logits = engine.step(state, torch.tensor([wanted[-1:]]))
    engine = toy_engine((1,), LENGTH, guesses=3)
    guess = knowing(torch.tensor([wanted + [0] * 9]), [True, True, False])
    found = speculate(engine, engine.new_state(1), Sequence(ids, options), guess)
    assert found[0].tolist() == wanted


def test_a_request_goes_on_from_what_is_held() -> None:
    ids, options = torch.tensor([[3, 1, 4, 1, 5]]), GenerateOptions(LENGTH)
    wanted = plain(ids, options)
    for held in (2, 5):
        engine = toy_engine((1,), LENGTH, guesses=3)
        state = engine.new_state(1)
        logits = engine.step(state, ids[:, :held], keep=1) if held == 5 else None
        if held == 2:
            engine.step(state, ids[:, :2])
        sequence = Sequence(ids, options, logits=logits)
        found = speculate(engine, state, sequence, knowing(wanted, [True, False]), held=0 if held == 5 else 2)
        assert torch.equal(found, wanted)


def test_padding_stays_hidden() -> None:
    ids = torch.tensor([[0, 0, 3, 1, 4]])
    mask, positions = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 2]])
    options = GenerateOptions(LENGTH - 4)
    wanted = plain(ids, options, attention_mask=mask, position_ids=positions)
    engine = toy_engine((1,), LENGTH, guesses=3)
    sequence = Sequence(ids, options, positions)
    found = speculate(engine, engine.new_state(1), sequence, knowing(wanted, [True, False, True]), mask)
    assert torch.equal(found, wanted)


def test_what_does_not_fit_is_refused_before_a_step() -> None:
    engine = toy_engine((1,), LENGTH, guesses=3)
    sequence = Sequence(torch.tensor([[1]]), GenerateOptions(LENGTH + 1))
    with pytest.raises(InputError, match="do not fit max_length=32"):
        speculate(engine, engine.new_state(1), sequence, PromptLookup(3))
    assert steps(engine) == (0, 0)


@pytest.mark.parametrize("tokens", [2, 3, 4, 5])
def test_a_call_of_few_tokens_is_one_step(tokens: int) -> None:
    """As in transformers' own loop with a model that guesses; more than fit are run as a prompt."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5]])
    engine, other = toy_engine((1,), LENGTH, guesses=3), toy_engine((1,), LENGTH)
    states = [e.new_state(1) for e in (engine, other)]
    for keep in (0, 1):
        found, wanted = (
            e.step(s, ids[:, s.length : s.length + tokens] if s.length else ids[:, :4], keep=keep)
            for e, s in zip((engine, other), states, strict=True)
        )
        assert torch.equal(found, wanted)
        assert states[0].length == states[1].length
    follow = [e.step(s, ids[:, :1]) for e, s in zip((engine, other), states, strict=True)]
    assert torch.equal(*follow)
    assert steps(engine)[1] == 1 + (tokens <= 4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 5))
def test_guesses_are_what_followed_the_longest_earlier_run(known: list[int], ngram: int, tokens: int) -> None:
    lookup = PromptLookup(tokens, ngram)
    for length in range(len(known)):
        lookup(known[:length])  # as the text grows
    found, run = lookup(known)
    for size in range(min(ngram, len(known) - 1), 0, -1):
        ends = [e for e in range(size, len(known)) if known[e - size : e] == known[-size:]]
        if ends:
            assert run == size
            assert found in [known[e : e + tokens] for e in ends]
            assert len(found) == max(min(tokens, len(known) - e) for e in ends)
            return
    assert (found, run) == ([], 0)
