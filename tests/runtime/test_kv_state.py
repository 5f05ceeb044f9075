"""Request states and the engine: what they hold after steps, crops and reorders, and which program runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tilewright.ir.program import InputError
from tilewright.runtime.engine import Engine

from .toy import VOCAB, ToyExecutor, scores, toy_engine

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 12, 1], [2, 7, 18, 28, 18, 28, 45, 9, 4, 5, 23, 6]])


def _expected(ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scores [B, S, V] of every prefix at once."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = torch.arange(ids.shape[1])
    rows = [
        [scores(i[:n], positions[:n], m[:n]) for n in range(1, len(i) + 1)]
        for i, m in zip(ids, mask, strict=True)
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 10, 11])
def test_steps_of_any_size_continue_one_another(cut: int) -> None:
    engine = toy_engine()
    state = engine.new_state(2)
    first, second = engine.step(state, IDS[:, :cut]), engine.step(state, IDS[:, cut:])
    assert torch.equal(torch.cat([first, second], dim=1), _expected(IDS))
    assert state.length == IDS.shape[1]


@pytest.mark.parametrize("keep", [1, 2, 3, 8, 12, 40])
def test_kept_logits_may_span_chunks(keep: int) -> None:
    engine = toy_engine(chunk=5)
    assert torch.equal(engine.step(engine.new_state(2), IDS, keep=keep), _expected(IDS)[:, -keep:])
    assert isinstance(engine.prefill_executor, ToyExecutor)
    assert engine.prefill_executor.chunks == [5, 5, 2]


def test_batches_run_in_the_next_bucket_up() -> None:
    engine = toy_engine(batch_sizes=(4, 1, 2))
    assert engine.buckets == (1, 2, 4)
    assert [engine.new_state(n).rows for n in (1, 2, 3, 4)] == [1, 2, 4, 4]
    with pytest.raises(InputError, match=r"batch of 5 .*compile with batch_sizes=\(\.\.\., 5\)"):
        engine.new_state(5)
    with pytest.raises(InputError, match="empty batch"):
        engine.new_state(0)


def test_a_mask_hides_positions_until_another_is_given() -> None:
    engine = toy_engine()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    state = engine.new_state(2)
    engine.step(state, IDS[:, :11], mask[:, :11])
    assert torch.equal(engine.step(state, IDS[:, 11:], mask), _expected(IDS, mask)[:, 11:])
    state.crop(11)
    # None means that everything counts, as it does in transformers, the hidden past included.
    assert torch.equal(engine.step(state, IDS[:, 11:]), _expected(IDS)[:, 11:])


def test_mask_positions_count_attended_tokens() -> None:
    plain = toy_engine()
    engine = Engine(
        list(plain.decode_executors.values()),
        plain.prefill_executor,
        type(plain.spec)(**{**vars(plain.spec), "positions": "mask"}),
    )
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    state = engine.new_state(2)
    engine.step(state, IDS[:, :11], mask[:, :11])
    engine.step(state, IDS[:, 11:], mask)
    history = state.buffers["history"][:2, 1, :12, 0]
    assert history.tolist() == [list(range(12)), [-1] * 4 + list(range(8))]


def test_crop_forgets() -> None:
    engine = toy_engine()
    state = engine.new_state(2)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 8] = False
    engine.step(state, IDS[:, :10], mask)
    state.crop(6)
    assert torch.equal(engine.step(state, IDS[:, 6:]), _expected(IDS)[:, 6:])
    for length in (-1, 13):
        with pytest.raises(InputError, match="cannot crop"):
            state.crop(length)


def test_reorder_keeps_addresses() -> None:
    engine = toy_engine()
    state = engine.new_state(2)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    engine.step(state, IDS[:, :8], mask[:, :8])
    before = [b.data_ptr() for b in state.buffers.values()], state.mask.data_ptr(), state.version
    state.reorder(torch.tensor([1, 1]))
    assert before == ([b.data_ptr() for b in state.buffers.values()], state.mask.data_ptr(), state.version)
    both, hidden = IDS[1:].expand(2, -1), mask[1:].expand(2, -1)
    assert torch.equal(engine.step(state, both[:, 8:], hidden), _expected(both, hidden)[:, 8:])
    with pytest.raises(InputError, match="needs 2 row numbers"):
        state.reorder(torch.tensor([0]))


def test_select_changes_the_batch() -> None:
    engine = toy_engine()
    state = engine.new_state(2)
    engine.step(state, IDS[:, :8])
    state.scratch["arena"] = "addresses"
    state.select(torch.tensor([1]), engine.bucket(1))
    assert (state.batch, state.rows, state.version, state.scratch) == (1, 1, 1, {})
    assert torch.equal(engine.step(state, IDS[1:, 8:9]), _expected(IDS[1:])[:, 8:9])
    state.select(torch.tensor([0, 0, 0]), engine.bucket(3))
    assert (state.batch, state.rows) == (3, 4)
    assert torch.equal(
        engine.step(state, IDS[1:, 9:].expand(3, -1)), _expected(IDS[1:])[:, 9:].expand(3, -1, -1)
    )
    with pytest.raises(InputError, match="does not fit"):
        state.select(torch.arange(3), 2)


def test_a_failing_step_leaves_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = toy_engine()
    state = engine.new_state(2)
    engine.step(state, IDS[:, :3])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.prefill_executor, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step(state, IDS[:, 3:], torch.zeros_like(IDS))
    assert state.length == 3
    assert bool(state.mask[:, 3:].all())
    assert torch.equal(engine.step(state, IDS[:, 3:]), _expected(IDS)[:, 3:])


def test_states_survive_inference_mode() -> None:
    engine = toy_engine()
    with torch.inference_mode():
        state = engine.new_state(2)
        engine.step(state, IDS[:, :3])
    assert torch.equal(engine.step(state, IDS[:, 3:]), _expected(IDS)[:, 3:])


def test_sizes() -> None:
    state = toy_engine().new_state(3)
    assert state.nbytes == 4 * 2 * 32 * 1 * 8
    assert state.spec.slots[0].nbytes(4, 32) == state.nbytes
    assert state.logits.shape == (4, 1, VOCAB)
