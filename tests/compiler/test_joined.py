"""Requests of several threads in one batch: each has the tokens that Hugging Face gives it alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.parametrize("name", KINDS)
def test_each_request_has_the_tokens_of_hugging_face(name: str) -> None:
    model = random(DECODERS[name], hf.AutoModelForCausalLM)
    fast = tw.compile(model, max_length=64, batch_sizes=BUCKETS, backend=KINDS[name], autotune="off")
    calls = [greedy(ids, 4 + 3 * n) for n, ids in enumerate(prompts())]
    for found, call in zip(at_once(fast, calls), calls, strict=True):
        assert found.tolist() == call(model).tolist()


def test_prompts_with_images_join_with_the_state_that_they_left() -> None:
    fast, model = multimodal.compiled("qwen2_vl"), multimodal.model_of("qwen2_vl")
    given = [multimodal.prompts("qwen2_vl", seed, rows=1) for seed in range(3)]
    texts = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in prompts()[:2]]
    calls = [
        lambda m, inputs=inputs: m.generate(**inputs, do_sample=False, max_new_tokens=16)
        for inputs in (*given, *texts)
    ]
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
    ]
    expected = [call(llama).tolist() for call in calls]
    assert expected[0] != greedy(a, 20)(llama).tolist()
    assert [f.tolist() for f in at_once(fast, calls)] == expected


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
    joined.close()


def test_generate_batch_is_that_of_hugging_face(llama: PreTrainedModel, fast: Any) -> None:
    asked = [ids[0].tolist() for ids in prompts()[:4]]
    config = hf.GenerationConfig(max_new_tokens=14, do_sample=False, eos_token_id=[7, 40, 90], pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    theirs, ours = (
        model.generate_batch(asked, generation_config=config, continuous_batching_config=small, warmup=False)
        for model in (llama, fast)
    )
    assert list(ours) == list(theirs)
    for name, output in theirs.items():
        assert ours[name].generated_tokens == output.generated_tokens
        assert (ours[name].prompt_ids, ours[name].status) == (output.prompt_ids, output.status)
    assert fast.generate_batch([]) == {}


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


def test_batches_of_pages_are_refused_by_name(fast: Any) -> None:
    with pytest.raises(InputError, match="use generate_batch"):
        fast.init_continuous_batching()
    with pytest.raises(InputError, match="use generate_batch"):
        fast.continuous_batching_context_manager()
