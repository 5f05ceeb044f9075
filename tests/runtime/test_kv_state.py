"""Request states and the engine: what they hold after steps, crops and reorders, and which program runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewright.ir.program import InputError
from tilewright.ir.types import tensor_type
from tilewright.runtime.engine import Engine
from tilewright.runtime.executor import EngineSpec, TensorSpec
from tilewright.runtime.kv_state import RequestState

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


@pytest.mark.parametrize("new", [1, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_a_failing_step_leaves_the_state(monkeypatch: pytest.MonkeyPatch, new: int, padded: bool) -> None:
    engine = toy_engine()
    state = engine.new_state(2)
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    engine.step(state, IDS[:, :3], mask[:, :3] if padded else None)
    before = state.mask.clone()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for other in (torch.zeros_like(IDS)[:, : 3 + new], None):
        with monkeypatch.context() as patch:
            for executor in (engine.prefill_executor, *engine.decode_executors.values()):
                patch.setattr(executor, "run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step(state, IDS[:, 3 : 3 + new], other)
        assert (state.length, state.padded) == (3, padded)
        assert torch.equal(state.mask, before)
    # The past is hidden as it was: a decode step writes no mask.
    state.ids[:2], state.positions[:2] = IDS[:, 3:4], 3
    engine.advance(state)
    assert torch.equal(state.logits[:2], _expected(IDS, mask if padded else None)[:, 3:4])


def test_an_interruption_between_chunks_leaves_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = toy_engine(chunk=5)
    state = engine.new_state(2)
    engine.step(state, IDS[:, :3])
    run = engine.prefill_executor.run
    calls = iter([run, None])

    def second_fails(*arguments: Any) -> None:
        next(calls)(*arguments)  # type: ignore[misc]

    with monkeypatch.context() as patch:
        patch.setattr(engine.prefill_executor, "run", second_fails)
        with pytest.raises(TypeError):
            engine.step(state, IDS[:, 3:])
    assert state.length == 3
    assert torch.equal(engine.step(state, IDS[:, 3:]), _expected(IDS)[:, 3:])


def test_a_deep_copy_goes_on_by_itself() -> None:
    engine = toy_engine()
    state = engine.new_state(2)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    engine.step(state, IDS[:, :6], mask[:, :6])
    state.scratch["arena"] = "addresses"
    with torch.inference_mode():
        twin = copy.deepcopy(state)
    assert twin.scratch == {}
    assert twin.spec is state.spec
    other = IDS.flip(1)
    engine.step(twin, other[:, :6], torch.cat([mask[:, :6], mask.new_ones(2, 6)], dim=1))
    assert torch.equal(engine.step(state, IDS[:, 6:], mask), _expected(IDS, mask)[:, 6:])
    branch = torch.cat([IDS[:, :6], other[:, :7]], dim=1)
    wide = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    assert torch.equal(engine.step(twin, branch[:, 12:], wide), _expected(branch, wide)[:, 12:])


def _module_engine(dtype: str) -> Engine:
    spec = EngineSpec(
        kind="module",
        device=torch.device("cpu"),
        inputs=(TensorSpec("x", tensor_type(dtype, [3])),),
        outputs=(TensorSpec("y", tensor_type(dtype, [3])),),
    )

    class Copies:
        phase, batch = "forward", 0

        def run(
            self,
            inputs: Mapping[str, Tensor],
            dims: Mapping[str, int],
            state: RequestState | None,
            outputs: Mapping[str, Tensor],
        ) -> None:
            outputs["y"].copy_(inputs["x"])

    return Engine([], Copies(), spec)


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        ("u8", (0, 255), (-1, 256)),
        ("i32", (-(2**31), 2**31 - 1), (-(2**31) - 1, 2**31)),
        ("i8", (-128,), (128,)),
    ],
)
def test_integers_that_do_not_fit_are_refused(
    dtype: str, good: tuple[int, ...], bad: tuple[int, ...]
) -> None:
    engine = _module_engine(dtype)
    for value in good:
        assert engine.forward({"x": torch.tensor([0, value, 1])})["y"].tolist() == [0, value, 1]
    for value in bad:
        with pytest.raises(InputError, match=f"x holds {value}, which does not fit"):
            engine.forward({"x": torch.tensor([0, value, 1])})


def test_inputs_that_are_no_tensors_or_beyond_int64() -> None:
    with pytest.raises(InputError, match="x must be a tensor, got list"):
        _module_engine("i64").forward({"x": [1, 2, 3]})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="beyond int64"):
        _module_engine("i64").forward({"x": torch.tensor([1, 2, 2**64 - 1], dtype=torch.uint64)})


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
