"""Assisted decoding of compiled models: Hugging Face's tokens, by steps that check several guesses at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

import tilewright as tw
from tilewright.errors import OptionError

from . import multimodal
from .models import random, tiny
from .test_architectures import DECODERS

GUESSES = 4
KINDS = {"llama": "cpp", "opt": "reference", "gemma2": "cpp", "bloom": "reference", "gpt_oss": "reference"}
"""Rotations; learned positions; windows and soft caps; a bias by distance; experts and sinks."""


@cache
def pair(name: str) -> tuple[PreTrainedModel, Any]:
    model = random(DECODERS[name], hf.AutoModelForCausalLM)
    return model, compiled(model, KINDS[name])


def compiled(model: PreTrainedModel, backend: str = "cpp", **options: Any) -> Any:
    options = {"max_length": 64, "autotune": "off", "speculative_tokens": GUESSES, **options}
    return tw.compile(model, backend=backend, **options)


def repeating(length: int, seed: int = 0) -> Tensor:
    """A prompt whose second half is its first."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (1, length), generator=draw).repeat(1, 2)


@contextmanager
def counted(fast: Any) -> Iterator[list[int]]:
    """The number of tokens of each step that checked guesses."""
    engine, sizes = fast._tilewright.engine, list[int]()
    verify = engine.verify

    def noted(state: Any, tokens: Any, positions: Any = None) -> Tensor:
        sizes.append(len(tokens))
        found: Tensor = verify(state, tokens, positions)
        return found

    engine.verify = noted
    try:
        yield sizes
    finally:
        del engine.verify


LOOKUP = {"do_sample": False, "max_new_tokens": 28, "pad_token_id": 0, "prompt_lookup_num_tokens": 3}


@pytest.mark.parametrize("name", KINDS)
def test_prompt_lookup_gives_hugging_faces_tokens(name: str) -> None:
    model, fast = pair(name)
    for length, more in ((9, {}), (3, {"repetition_penalty": 1.3}), (14, {"max_matching_ngram_size": 3})):
        ids = repeating(length)
        with counted(fast) as sizes:
            found = fast.generate(ids, **LOOKUP, **more)
        assert torch.equal(found, model.generate(ids, **LOOKUP, **more))
        assert torch.equal(found, model.generate(ids, **LOOKUP | {"prompt_lookup_num_tokens": None}, **more))
        assert sizes
        assert max(sizes) <= 4  # as many guesses as were asked for, of those that there is room for


def test_draws_are_those_of_plain_sampling() -> None:
    _, fast = pair("llama")
    ids = repeating(9)
    how = LOOKUP | {"do_sample": True, "temperature": 0.6, "top_k": 12}
    torch.manual_seed(4)
    wanted = fast.generate(ids, **how | {"prompt_lookup_num_tokens": None})
    torch.manual_seed(4)
    with counted(fast) as sizes:
        assert torch.equal(fast.generate(ids, **how), wanted)
    assert sizes


def test_a_model_that_guesses_has_its_guesses_checked_in_the_same_steps() -> None:
    model, fast = pair("llama")
    assistant = random(DECODERS["llama"], hf.AutoModelForCausalLM)
    assistant.generation_config.num_assistant_tokens = GUESSES
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    how = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "assistant_model": assistant}
    with counted(fast) as sizes:
        found = fast.generate(repeating(9), **how)
    assert torch.equal(found, model.generate(repeating(9), **how))
    assert max(sizes) == GUESSES + 1


def test_streams_caches_and_stop_strings_are_as_without_guesses() -> None:
    model, fast = pair("llama")
    ids = repeating(9)

    class Told:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    told = Told()
    found = fast.generate(ids, **LOOKUP, streamer=told)
    assert told.tokens == [*found[0].tolist(), -1]
    with torch.no_grad():
        first = fast(input_ids=ids[:, :7])
        cache = first.get("cache", first.get("past_key_values"))
        name = "cache" if "cache" in first else "past_key_values"
    again = fast.generate(ids, **LOOKUP, **{name: cache})
    assert torch.equal(again, found)
    eos = int(found[0, 24])
    ended = fast.generate(ids, **LOOKUP, eos_token_id=eos)
    assert torch.equal(ended, model.generate(ids, **LOOKUP, eos_token_id=eos))


@pytest.mark.parametrize("weights", [None, "int4"])
def test_a_step_of_several_tokens_is_as_close_as_steps_of_one(weights: str | None) -> None:
    """In bfloat16, by the kernels that eight rows share their weights in."""
    model = tiny("llama").to(torch.bfloat16)
    fast = compiled(model, weights=weights, speculative_tokens=7)
    engine = fast._tilewright.engine
    ids = repeating(12)
    states = [engine.new_state(1) for _ in range(2)]
    for state in states:
        engine.step(state, ids[:, :10], keep=1)
    several = engine.step(states[0], ids[:, 10:18])
    single = torch.cat([engine.step(states[1], ids[:, n : n + 1]) for n in range(10, 18)], dim=1)
    scale = single.float().abs().max()
    assert (several.float() - single.float()).abs().max() < 0.02 * scale


def test_images_and_positions_of_several_numbers() -> None:
    model = multimodal.model_of("qwen2_vl")
    fast = compiled(model, "reference", max_length=96)
    inputs = multimodal.prompts("qwen2_vl", rows=1)
    how = {**inputs, **LOOKUP}
    with counted(fast) as sizes:
        assert torch.equal(fast.generate(**how), model.generate(**inputs, **LOOKUP))
    assert sizes


def test_encoder_decoders_check_guesses_too() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**shape, decoder_start_token_id=0)).eval()
    fast = compiled(model, "reference", max_length=32)
    ids, how = repeating(6), LOOKUP | {"max_new_tokens": 20, "eos_token_id": None}
    with counted(fast) as sizes:
        assert torch.equal(fast.generate(ids, **how), model.generate(ids, **how))
    assert sizes


def test_batches_and_models_without_such_a_program_are_left_to_transformers() -> None:
    model, _ = pair("llama")
    without = compiled(model, "reference", speculative_tokens=0)
    assert torch.equal(without.generate(repeating(9), **LOOKUP), model.generate(repeating(9), **LOOKUP))
    several = compiled(model, "reference", batch_sizes=(2,))
    with pytest.raises(ValueError, match="batch_size = 1"):
        several.generate(repeating(9).repeat(2, 1), **LOOKUP)


def test_one_sequence_in_a_larger_bucket() -> None:
    """Steps of several tokens run its row alone, steps of one also the rows beside it, at positions that there are."""
    model = tiny("opt")
    fast = compiled(model, "reference", batch_sizes=(2,))
    with counted(fast) as sizes:
        assert torch.equal(fast.generate(repeating(5), **LOOKUP), model.generate(repeating(5), **LOOKUP))
    assert sizes
    engine, state = fast._tilewright.engine, fast._tilewright.engine.new_state(1)
    for _ in range(3):
        engine.step(state, repeating(3))
        assert state.positions[1].item() == 0
        engine.advance(state)
        state.positions += 1
    state = engine.new_state(1)
    fast._tilewright.engine.step(state, repeating(4), keep=1)
    fast._tilewright.engine.verify(state, [5, 6, 7])
    state.take_back(2)
    assert state.positions.flatten().tolist() == [8, 0]


def test_what_cannot_work_is_refused_by_name() -> None:
    for wrong in (8, -1, True, "4"):
        with pytest.raises(OptionError, match="speculative_tokens must be a number from 0 to 7"):
            tw.compile(tiny("llama"), backend="reference", speculative_tokens=wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="speculative_tokens=4 is no less than max_length=4"):
        tw.compile(tiny("llama"), backend="reference", speculative_tokens=4, max_length=4)
    _, fast = pair("opt")
    for wrong in ({"prompt_lookup_num_tokens": -1}, {"max_matching_ngram_size": -1}):
        with pytest.raises(ValueError, match="Invalid max_matching_ngram_size or num_output_tokens"):
            fast.generate(repeating(5), **LOOKUP | wrong)
    with pytest.raises(OptionError, match="cannot take back a guessed token"):
        tw.compile(tiny("mamba"), backend="reference", speculative_tokens=2)


def test_the_report_and_the_ir_show_the_program() -> None:
    _, fast = pair("llama")
    report = fast.report()
    assert report.phase("verify").dims["S"] == GUESSES + 1
    assert "verify" in str(report)
    assert "S" not in fast.ir("verify").split("func")[0]
