"""Requests whose layers are recurrent: a toy whose state is a running sum shows who goes on from what."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tilewright.ir.program import InputError
from tilewright.runtime.engine import Engine
from tilewright.runtime.executor import RecurrentSlot
from tilewright.runtime.generate import generate
from tilewright.runtime.kv_state import RequestState
from tilewright.runtime.sampling import GenerateOptions

from .toy import VOCAB, toy_engine

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8], [2, 7, 18, 28, 18, 28, 45, 9], [6, 6, 1, 0, 4, 4, 30, 2]])
SLOTS = (RecurrentSlot("sum", (3,), torch.float64), RecurrentSlot("last", (2, 1), torch.int64))


class SumExecutor:
    """Scores depend on a sum over the past in which order counts, and on the last token; fails when told to."""

    def __init__(self, phase: str, batch: int) -> None:
        self.phase, self.batch = phase, batch
        self.fails = False

    def run(
        self,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        state: RequestState | None,
        outputs: Mapping[str, Tensor],
    ) -> None:
        assert state is not None
        rows, last = dims["B"], dims["L"]
        total, token = state.buffers["sum"][:rows], state.buffers["last"][:rows]
        for s in range(dims["S"]):
            total.mul_(0.5).add_(inputs["input_ids"][:, s : s + 1])
            token.copy_(inputs["input_ids"][:, s : s + 1, None].expand(-1, 2, -1))
            if (n := s - dims["S"] + last) >= 0:
                level = total[:, :1] * torch.arange(1, VOCAB + 1) + token[:, 0]
                outputs["logits"][:, n] = torch.sin(level).float()
        if self.fails:
            raise KeyboardInterrupt


def engine_of(chunk: int = 3) -> Engine:
    spec = replace(toy_engine(max_length=16, chunk=chunk).spec, slots=(), recurrent=SLOTS)
    return Engine([SumExecutor("decode", b) for b in (1, 4)], SumExecutor("prefill", 0), spec)


def expected(ids: Tensor) -> Tensor:
    """Scores of every position of rows that begin anew."""
    engine = engine_of(chunk=16)
    return engine.step(engine.new_state(ids.shape[0]), ids)


@pytest.mark.parametrize("pieces", [(8,), (1, 7), (4, 1, 1, 2)])
def test_pieces_go_on_from_each_other(pieces: tuple[int, ...]) -> None:
    engine = engine_of()
    state = engine.new_state(3)
    found = [engine.step(state, piece) for piece in IDS.split(pieces, dim=1)]
    assert torch.equal(torch.cat(found, dim=1), expected(IDS))


def test_a_state_is_cleared_for_the_next_request() -> None:
    engine = engine_of()
    state = engine.new_state(3)
    engine.step(state, IDS)
    state.reset(2)
    assert not any(b.any() for b in state.buffers.values())
    assert torch.equal(engine.step(state, IDS[:2]), expected(IDS[:2]))


def test_rows_change_places_and_numbers() -> None:
    engine = engine_of()
    state = engine.new_state(3)
    engine.step(state, IDS[:, :5])
    before = [b.data_ptr() for b in state.buffers.values()]
    state.reorder(torch.tensor([2, 0, 0]))
    assert before == [b.data_ptr() for b in state.buffers.values()]
    state.select(torch.tensor([1, 0, 0, 2]), 4)
    rows = IDS[[0, 2, 2, 0]]
    twin = copy.deepcopy(state)
    assert torch.equal(engine.step(state, rows[:, 5:]), expected(rows)[:, 5:])
    state.select(torch.tensor([3]), 1)  # another bucket
    more = torch.tensor([[1, 2]])
    longer = torch.cat([rows[3:], more], dim=1)
    assert torch.equal(engine.step(state, more), expected(longer)[:, 8:])
    assert torch.equal(engine.step(twin, rows[:, 5:]), expected(rows)[:, 5:])


@pytest.mark.parametrize("new", [1, 4])
def test_a_failed_step_is_undone(new: int) -> None:
    """It had gone on already, by one token or by chunks of several."""
    engine = engine_of()
    state = engine.new_state(3)
    engine.step(state, IDS[:, :4])
    executors = (engine.prefill_executor, *engine.decode_executors.values())
    for executor in executors:
        assert isinstance(executor, SumExecutor)
        executor.fails = True
    with pytest.raises(KeyboardInterrupt):
        engine.step(state, IDS[:, 4 : 4 + new])
    for executor in executors:
        assert isinstance(executor, SumExecutor)
        executor.fails = False
    assert torch.equal(engine.step(state, IDS[:, 4:]), expected(IDS)[:, 4:])


def test_a_state_cannot_go_back() -> None:
    engine = engine_of()
    state = engine.new_state(3)
    engine.step(state, IDS)
    state.crop(8)
    for length in (7, 0):
        with pytest.raises(InputError, match="recurrent layer has taken them in"):
            state.crop(length)
    assert state.length == 8


@pytest.mark.parametrize("look_every", [None, 1, 4])
def test_generation_does_not_run_on(look_every: int | None) -> None:
    """A GPU's loop looks at every step, so that the state holds what was kept and not more."""
    engine = engine_of()
    free = generate(
        engine, engine.new_state(1), IDS[:1], GenerateOptions(max_length=15, eos_ids=(), pad_id=0)
    )
    end = int(free[0, 10])
    state = engine.new_state(1)
    options = GenerateOptions(max_length=15, eos_ids=(end,), pad_id=0)
    found = generate(engine, state, IDS[:1], options, look_every=look_every)
    assert torch.equal(found, free[:, : found.shape[1]])
    assert int(found[0, -1]) == end
    assert state.length == found.shape[1] - 1
    assert torch.equal(engine.step(state, found[:, -1:]), expected(found)[:, -1:])


def test_sizes() -> None:
    """In whole cache lines, beside each other."""
    state = engine_of().new_state(3)
    assert [b.shape for b in state.buffers.values()] == [(4, 3), (4, 2, 1)]
    assert state.nbytes == sum(slot.nbytes(4) for slot in SLOTS) == 4 * 3 * 8 + 4 * 2 * 8
    first, second = (b.data_ptr() for b in state.buffers.values())
    assert second - first == 128
