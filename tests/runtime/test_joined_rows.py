"""Rows of several requests in one state: whatever joins and leaves, each row goes on as it would alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime.engine import Engine
from tilewright.runtime.joined_rows import JoinedRows
from tilewright.runtime.kv_state import RequestState

from .toy import VOCAB, toy_engine

LENGTH = 24
BUCKETS = (1, 2, 4)


class Alone:
    """A sequence in a state of its own, which the joined row has to keep up with."""

    def __init__(self, engine: Engine, ids: Sequence[int]) -> None:
        self.engine, self.state = engine, engine.new_state(1)
        self.logits = engine.step(self.state, torch.tensor([ids]), keep=1)[0, 0]

    @property
    def token(self) -> int:
        return int(self.logits.argmax())

    def step(self) -> None:
        self.logits = self.engine.step(self.state, torch.tensor([[self.token]]))[0, 0]


def copied(state: RequestState, engine: Engine) -> RequestState:
    """A state of one row for joining, which is overwritten afterwards: nothing may refer to it."""
    twin = engine.new_state(1)
    twin.length = state.length
    twin.buffers["history"][:, :, : state.length] = state.buffers["history"][:, :, : state.length]
    twin.positions.copy_(state.positions)
    return twin


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LENGTH - 2)
events = st.lists(st.one_of(prompts, st.integers(0, 3), st.just("step")), min_size=1, max_size=30)


@settings(deadline=None)
@given(events)
def test_each_row_goes_on_as_it_would_alone(happening: list[list[int] | int | str]) -> None:
    engine = toy_engine(BUCKETS, LENGTH)
    rows, alone = JoinedRows(engine), list[Alone]()
    for event in happening:
        if isinstance(event, list) and rows.count < max(BUCKETS):
            alone.append(Alone(toy_engine((1,), LENGTH), event))
            one = copied(alone[-1].state, engine)
            rows.join(one)
            one.buffers["history"].fill_(torch.nan)
        elif isinstance(event, int) and event < rows.count:
            rows.leave(event)
            alone[event] = alone[-1]
            alone.pop()
        elif event == "step" and alone and max(rows.lengths) < LENGTH:
            logits = rows.step([each.token for each in alone])
            for row, each in enumerate(alone):
                each.step()
                assert torch.equal(logits[row, 0], each.logits)
        assert rows.lengths == [each.state.length for each in alone]
        assert max(rows.lengths, default=0) <= rows.length <= LENGTH


def joined(*prompts: Sequence[int]) -> tuple[JoinedRows, Engine]:
    engine = toy_engine(BUCKETS, LENGTH)
    rows = JoinedRows(engine)
    for ids in prompts:
        rows.join(Alone(engine, ids).state)
    return rows, engine


def test_a_step_runs_the_program_of_the_smallest_bucket_and_memory_grows_as_it_must() -> None:
    rows, engine = joined([1, 2, 3])
    assert rows.step([4]).shape[0] == 1
    for bucket in (2, 4, 4):
        rows.join(Alone(engine, [5, 6]).state)
        assert rows.step([7] * rows.count).shape[0] == bucket
    for bucket in (4, 2, 1):
        rows.leave(0)
        assert rows.step([8] * rows.count).shape[0] == bucket
    assert rows.step([9]).data_ptr() == rows.step([9]).data_ptr()  # in the memory that there is


def test_rows_move_to_the_front_once_the_longest_has_left() -> None:
    rows, _ = joined(range(20), range(4))
    rows.leave(0)
    assert rows.length == 4
    rows.leave(0)
    assert rows.length == rows.count == 0


def test_rows_that_are_short_but_stand_at_the_end_go_on_there_is_room() -> None:
    rows, _ = joined(range(LENGTH - 1), range(14))
    rows.step([1, 2])
    rows.leave(0)
    assert rows.length == LENGTH  # more than half of which is taken
    rows.step([3])
    assert rows.length == rows.lengths[0] == 16


def test_what_another_left_does_not_reach_a_row_behind_its_mask() -> None:
    rows, engine = joined(range(20), range(3))
    whole = rows._whole
    assert whole is not None
    whole.buffers["history"][1] = torch.nan
    rows.leave(1)
    rows.join(Alone(engine, [1, 2]).state)
    assert not whole.buffers["history"][1, :, : rows.length].isnan().any()
