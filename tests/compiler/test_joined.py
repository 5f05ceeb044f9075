"""Requests of several threads in one batch: each has the tokens that Hugging Face gives it alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import tilewright as tw
from tilewright.errors import InputError
from tilewright.joined import JoinedModel

from . import multimodal
from .models import random
from .test_adapters import with_adapters
from .test_architectures import DECODERS

BUCKETS = (1, 2, 4)
LENGTHS = (9, 1, 30, 4, 17, 2, 22)
KINDS = {
    "llama": "cpp", "opt": "reference", "gemma2": "cpp", "bloom": "reference", "qwen3_5": "cpp", "mamba": "reference",
}  # fmt: skip
"""Rotations; learned positions, which count the mask; windows and soft caps; a bias by distance; states of the delta
rule beside keys, by generated kernels, and of a scan alone."""


def prompts(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (1, n), generator=draw) for n in LENGTHS]


def at_once(model: Any, calls: list[Callable[[Any], Tensor]]) -> list[Tensor]:
    """What calls give that are made at once, each with the model as its request has it."""
    joined = JoinedModel(model)
    try:
        with ThreadPoolExecutor(len(calls)) as threads:
            return list(threads.map(lambda call: call(joined.for_request()), calls))
    finally:
        joined.close()


def greedy(ids: Tensor, new: int, **more: Any) -> Callable[[Any], Tensor]:
    return lambda model: model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, **more
    )


@cache
def kind(name: str) -> tuple[PreTrainedModel, Any]:
    """A model and the compiled one."""
    model = random(DECODERS[name], hf.AutoModelForCausalLM)
    return model, tw.compile(model, max_length=64, batch_sizes=BUCKETS, backend=KINDS[name], autotune="off")


@pytest.mark.parametrize("name", KINDS)
def test_each_request_has_the_tokens_of_hugging_face(name: str) -> None:
    model, fast = kind(name)
    calls = [greedy(ids, 4 + 3 * n) for n, ids in enumerate(prompts())]
    for found, call in zip(at_once(fast, calls), calls, strict=True):
        assert found.tolist() == call(model).tolist()


@pytest.mark.parametrize("name", KINDS)
def test_what_was_said_before_is_not_computed_anew(name: str) -> None:
    """A conversation of three turns, then one that leaves it in the middle of the second."""
    model, fast = kind(name)
    joined = JoinedModel(fast)
    said, turns = torch.empty(1, 0, dtype=torch.int64), []
    for new in (*prompts()[3:6], torch.tensor([[5, 5, 5]])):
        if len(turns) == 3:
            said = turns[1][:, :-6]
        said = greedy(torch.cat([said, new], dim=1), 8)(joined.for_request())
        assert said.tolist() == greedy(said[:, :-8], 8)(model).tolist()
        turns.append(said)
    # Of each turn all was run but its last token. A recurrent layer goes back to the end of a turn, not to its middle.
    middle = turns[0].shape[1] - 1 if name in ("qwen3_5", "mamba") else turns[1].shape[1] - 6
    assert joined.batch.prefixes.reused == turns[0].shape[1] + turns[1].shape[1] - 2 + middle
    joined.close()


def test_what_other_adapters_computed_is_not_used() -> None:
    model = with_adapters(random(DECODERS["llama"], hf.AutoModelForCausalLM))
    fast = tw.compile(model, max_length=64, backend="cpp", autotune="off")
    joined, call = JoinedModel(fast), greedy(prompts()[0], 8)
    found = []
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        found.append(call(joined.for_request()).tolist())
        assert found[-1] == call(model).tolist()
    assert found[0] == found[2] != found[1]
    assert joined.batch.prefixes.reused == 0
    call(joined.for_request())
    assert joined.batch.prefixes.reused == 8
    joined.close()


def test_prompts_with_images_join_with_the_state_that_they_left() -> None:
    fast, model = multimodal.compiled("qwen2_vl"), multimodal.model_of("qwen2_vl")
    given = [multimodal.prompts("qwen2_vl", seed, rows=1) for seed in range(3)]
    padded = {name: t.clone() for name, t in given[0].items()}
    padded["input_ids"][:, :3], padded["attention_mask"][:, :3] = 0, 0
    given.append(padded)  # runs by itself: rows that join have no padding
    texts = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in prompts()[:2]]
    calls = [
        lambda m, inputs=inputs: m.generate(**inputs, do_sample=False, max_new_tokens=16)
        for inputs in (*given, *texts)
    ]
    assert [f.tolist() for f in at_once(fast, calls)] == [call(model).tolist() for call in calls]


def test_rows_have_one_table_of_rotary_frequencies() -> None:
    """What outgrows the first of two tables runs by itself, also beside requests that do not."""
    config = hf.Phi3Config(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [9.0] * 8,
        },
    )  # fmt: skip
    model = random(config, hf.AutoModelForCausalLM)
    fast = tw.compile(model, max_length=64, batch_sizes=BUCKETS, backend="reference", autotune="off")
    draw = torch.Generator().manual_seed(1)
    sizes = ((40, 9), (5, 20), (41, 8), (6, 20), (30, 9))
    calls = [greedy(torch.randint(3, 128, (1, n), generator=draw), new) for n, new in sizes]
    assert [f.tolist() for f in at_once(fast, calls)] == [call(model).tolist() for call in calls]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return random(DECODERS["llama"], hf.AutoModelForCausalLM)


@pytest.fixture(scope="module")
def fast(llama: PreTrainedModel) -> Any:
    return tw.compile(llama, max_length=64, batch_sizes=BUCKETS, backend="cpp", autotune="off")


class Counting(hf.StoppingCriteria):
    """Ends every row after so many tokens of any kind; transformers' own criteria are others."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, ids: Tensor, scores: Tensor, **more: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= self.tokens)


def test_what_the_loop_of_one_lacks_shares_steps_too(llama: PreTrainedModel, fast: Any) -> None:
    """Processors and criteria of transformers, and of callers, are asked for their own rows."""
    a, b, c, d, *_ = prompts()
    calls = [
        greedy(a, 20, repetition_penalty=1.7),
        greedy(
            b, 20, no_repeat_ngram_size=1, min_new_tokens=9, eos_token_id=list(range(3, 60)), pad_token_id=0
        ),
        greedy(c, 20, stopping_criteria=hf.StoppingCriteriaList([Counting(35)])),
        greedy(d, 20, bad_words_ids=[[n] for n in range(40)]),
        lambda model: model.generate(a, num_beams=2, do_sample=False, max_new_tokens=12),
        lambda model: model.generate(torch.cat([a, a]), do_sample=False, max_new_tokens=12),
        greedy(a, 12, eos_token_id=[-1, 999], min_new_tokens=4, pad_token_id=0),
    ]
    expected = [call(llama).tolist() for call in calls]
    assert expected[0] != greedy(a, 20)(llama).tolist()
    assert [f.tolist() for f in at_once(fast, calls)] == expected


def test_a_request_of_several_sequences_lets_others_go_on(fast: Any) -> None:
    ids, times, ends = prompts()[0], [], []

    class Timed:
        def put(self, tokens: Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def several(model: Any) -> Tensor:
        found = model.generate(torch.cat([ids, ids]), do_sample=False, min_new_tokens=50, max_new_tokens=50)
        ends.append(time.perf_counter())
        return found

    at_once(fast, [several, greedy(ids, 50, streamer=Timed(), min_new_tokens=50)])
    assert sum(moment < ends[0] for moment in times) > 25


def test_a_seed_gives_the_tokens_of_a_request_that_is_alone(fast: Any) -> None:
    ids = prompts()[0]
    joined = JoinedModel(fast)
    for more in ({}, {"top_k": 20, "temperature": 1.4}, {"repetition_penalty": 1.3}):
        how = {"do_sample": True, "max_new_tokens": 24, "attention_mask": torch.ones_like(ids), **more}
        torch.manual_seed(5)
        wanted = fast.generate(ids, **how).tolist()
        torch.manual_seed(5)
        models = [joined.for_request() for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            found = [f.tolist() for f in threads.map(lambda m, how=how: m.generate(ids, **how), models)]
        assert found[0] == wanted
        assert len({str(f) for f in found}) == 4
    torch.manual_seed(5)
    wanted = fast.generate(ids, do_sample=True, max_new_tokens=24).tolist()
    torch.manual_seed(5)
    guessing = joined.for_request()
    how = {"do_sample": True, "max_new_tokens": 24, "prompt_lookup_num_tokens": 3}
    assert guessing.generate(ids, **how).tolist() == wanted  # the batch does without guesses
    joined.close()


def test_generate_batch_is_that_of_hugging_face(llama: PreTrainedModel, fast: Any) -> None:
    asked = [ids[0].tolist() for ids in prompts()[:4]]
    config = hf.GenerationConfig(max_new_tokens=14, do_sample=False, eos_token_id=[7, 40, 90], pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    how: Any = {"generation_config": config, "continuous_batching_config": small, "warmup": False}
    theirs = llama.generate_batch(asked, **how)
    state = torch.get_rng_state()
    ours = fast.generate_batch(asked, **how)
    assert list(ours) == list(theirs)
    for name, output in theirs.items():
        assert ours[name].generated_tokens == output.generated_tokens
        assert (ours[name].prompt_ids, ours[name].status) == (output.prompt_ids, output.status)
    assert fast.generate_batch([]) == {}
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn


def test_generate_batch_names_what_failed_and_answers_the_others(fast: Any) -> None:
    with pytest.warns(UserWarning, match="1 of 2 requests failed; req_1: .*out of range"):
        outputs = fast.generate_batch(
            [[1, 2], [1, 999]], max_new_tokens=3, do_sample=False, record_timestamps=True
        )
    good, bad = outputs.values()
    assert len(good.generated_tokens) == len(good.timestamps) == 3
    assert good.lifespan[0] <= good.timestamps[0] <= good.timestamps[-1] <= good.lifespan[1]
    assert "out of range" in bad.error
    assert bad.is_finished()


def test_generate_batch_gives_several_answers_of_a_prompt(fast: Any) -> None:
    outputs = fast.generate_batch([[5, 6], [7]], num_return_sequences=3, do_sample=True, max_new_tokens=12)
    assert list(outputs) == [f"req_{n}{child}" for n in (0, 1) for child in ("__child#0", "__child#1", "")]
    assert len({str(o.generated_tokens) for o in outputs.values()}) == 6


def test_generate_batch_takes_what_it_can(fast: Any) -> None:
    with pytest.warns(UserWarning, match="1 of 2 requests failed; req_1"):
        good, bad = fast.generate_batch([[1, 2], None], max_new_tokens=3, do_sample=False).values()
    assert (len(good.generated_tokens), bad.prompt_ids) == (3, [])
    with pytest.raises(InputError, match="several answers of beams"):
        fast.generate_batch([[1, 2]], num_beams=2, num_return_sequences=2)


def test_a_seed_is_kept_where_the_models_own_config_draws(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast.generation_config, "do_sample", True)
    found = set()
    for _ in range(3):
        torch.manual_seed(3)
        outputs = fast.generate_batch([[5, 6], [7], [8]], hf.GenerationConfig(max_new_tokens=12))
        found.add(str([output.generated_tokens for output in outputs.values()]))
    assert len(found) == 1


def test_batches_of_pages_are_refused_by_name(fast: Any) -> None:
    with pytest.raises(InputError, match="use generate_batch"):
        fast.init_continuous_batching()
    with pytest.raises(InputError, match="use generate_batch"):
        fast.continuous_batching_context_manager()
