"""Our decoding loop on a toy model: against a plain loop, and draw for draw against transformers' warpers."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tilewright.ir.program import InputError
from tilewright.runtime.engine import Engine
from tilewright.runtime.generate import GenerateOptions, generate
from tilewright.runtime.kv_state import RequestState
from tilewright.runtime.sampling import Sampling, sample, sample_on_device

from .toy import VOCAB, scores, toy_engine

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [2, 7, 18, 28, 18, 28, 45], [1, 1, 2, 3, 5, 8, 13]])


def _plain(ids: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
    """Greedy search, each step from scratch. Positions count on from the length."""
    mask = torch.ones_like(ids) if mask is None else mask
    while ids.shape[1] < length:
        positions = torch.arange(ids.shape[1])
        best = [scores(i, positions, m).argmax() for i, m in zip(ids, mask, strict=True)]
        ids = torch.cat([ids, torch.stack(best)[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def _run(ids: Tensor, engine: Engine | None = None, mask: Tensor | None = None, **options: object) -> Tensor:
    engine = engine or toy_engine()
    chosen = GenerateOptions(**{"max_length": 20, **options})  # type: ignore[arg-type]
    return generate(engine, engine.new_state(ids.shape[0]), ids, chosen, attention_mask=mask)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_greedy(batch: int) -> None:
    assert torch.equal(_run(IDS[:batch]), _plain(IDS[:batch], 20))


def test_greedy_with_a_mask() -> None:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    mask[2, :1] = 0
    assert torch.equal(_run(IDS, mask=mask), _plain(IDS, 20, mask))


def test_one_new_token_and_one_token_prompt() -> None:
    assert torch.equal(_run(IDS, max_length=8), _plain(IDS, 8))
    assert torch.equal(_run(IDS[:, :1], max_length=2), _plain(IDS[:, :1], 2))


def test_rows_end_at_any_eos_and_are_padded() -> None:
    free = _plain(IDS, 20)
    eos = (int(free[0, 9]), int(free[1, 12]), int(free[2, 10]))
    result = _run(IDS, eos_ids=eos, pad_id=0)
    for row, whole in zip(result, free, strict=True):
        ends = [n for n in range(7, 20) if int(whole[n]) in eos]
        stop = ends[0] + 1
        assert torch.equal(row[:stop], whole[:stop])
        assert not row[stop:].any()
    ends_of_rows = [next(n for n in range(7, 20) if int(w[n]) in eos) for w in free]
    assert result.shape[1] == max(ends_of_rows) + 1
    with pytest.raises(InputError, match="pad_id"):
        _run(IDS, eos_ids=eos)


@pytest.mark.parametrize("look_every", [2, 3, 8])
def test_a_late_look_changes_nothing(look_every: int) -> None:
    """Steps that ran on after all rows had finished are taken back: from the tokens and from the state."""
    free = _plain(IDS, 20)
    for ends in ((9, 12, 10), (7, 7, 7), (9, 19, 10), (8, 8, 30)):
        eos = tuple(int(row[n]) for row, n in zip(free, ends, strict=True) if n < 20)
        options = GenerateOptions(max_length=20, eos_ids=eos, pad_id=0)
        engine = toy_engine()
        prompt, late = engine.new_state(3), engine.new_state(3)
        expected = generate(engine, prompt, IDS, options)
        found = generate(engine, late, IDS, options, look_every=look_every)
        assert torch.equal(found, expected)
        assert late.length == prompt.length == expected.shape[1] - 1
    assert torch.equal(generate(toy_engine(), late_state(), IDS, GenerateOptions(20), look_every=8), free)


def late_state() -> RequestState:
    return toy_engine().new_state(3)


def test_min_length_forbids_eos() -> None:
    eos = (int(_plain(IDS[:1], 8)[0, 7]),)
    assert _run(IDS[:1], eos_ids=eos, pad_id=0).shape[1] == 8
    longer = _run(IDS[:1], eos_ids=eos, pad_id=0, min_length=12)
    assert longer.shape[1] >= 12
    assert eos[0] not in longer[0, 7:12].tolist()


def test_a_prefix_in_the_state_is_not_run_again() -> None:
    engine = toy_engine()
    state = engine.new_state(3)
    engine.step(state, IDS[:, :4])
    result = generate(engine, state, IDS, GenerateOptions(20), held=4)
    assert torch.equal(result, _plain(IDS, 20))
    assert state.length == 19
    state.crop(4)
    new_only = generate(engine, state, IDS[:, 4:], GenerateOptions(16))
    assert torch.equal(new_only, _plain(IDS, 20)[:, 4:])


def test_streamers_get_each_step_and_the_end() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.steps: list[list[int]] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.steps.append(value.tolist())

        def end(self) -> None:
            self.ended = True

    engine, recorder = toy_engine(), Recorder()
    result = generate(engine, engine.new_state(3), IDS, GenerateOptions(12), streamer=recorder)
    assert recorder.steps == result[:, 7:].T.tolist()
    assert recorder.ended


def test_requests_in_threads_do_not_mix() -> None:
    engine = toy_engine()
    results: dict[int, Tensor] = {}

    def work(n: int) -> None:
        results[n] = generate(engine, engine.new_state(1), IDS[n : n + 1], GenerateOptions(20))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat([results[n] for n in range(3)]), _plain(IDS, 20))


def test_bad_input() -> None:
    engine = toy_engine()
    with pytest.raises(InputError, match=r"40 tokens.*max_length=32; compile with max_length=40"):
        _run(IDS, engine, max_length=40)
    with pytest.raises(InputError, match="raise it"):
        _run(IDS, engine, max_length=7)
    with pytest.raises(InputError, match="out of range"):
        _run(IDS + VOCAB, engine)
    with pytest.raises(InputError, match="temperature"):
        Sampling(temperature=0)
    assert torch.equal(_run(IDS, engine), _plain(IDS, 20))


WAYS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(top_k=7),
    Sampling(top_p=0.7),
    Sampling(top_k=20, top_p=0.9),
    Sampling(temperature=1.4, top_k=30, top_p=0.5),
    Sampling(top_k=1000, top_p=0.99),
    Sampling(top_p=0.0),
]


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("draw", [sample, sample_on_device])
def test_draws_are_those_of_transformers(
    draw: Callable[[Tensor, Sampling], Tensor], how: Sampling, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    warpers: list[TemperatureLogitsWarper | TopKLogitsWarper | TopPLogitsWarper] = []
    if how.temperature != 1:
        warpers.append(TemperatureLogitsWarper(how.temperature))
    if how.top_k:
        warpers.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        warpers.append(TopPLogitsWarper(how.top_p))
    for seed in range(50):
        logits = torch.randn(3, 400, generator=generator) * 3
        if ties:
            logits = logits.round()
        expected = logits.clone()
        for warper in warpers:
            expected = warper(torch.empty(3, 0), expected)
        torch.manual_seed(seed)
        drawn = torch.multinomial(expected.softmax(-1), 1)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(draw(logits.clone(), how), drawn)
        assert torch.equal(torch.get_rng_state(), after)


def test_rows_beyond_the_batch_count_from_the_start() -> None:
    """They are computed with the others: positions that go on from call to call leave the table that they index."""
    engine = toy_engine(batch_sizes=(4,))
    state = engine.new_state(1)
    for _ in range(3):
        generate(engine, state, IDS[:1, :1], GenerateOptions(max_length=9))
        assert state.positions.max().item() < 9
        state.crop(0)
