"""What Transformers can be asked for and a compiled model does not do is refused, wherever it is asked for.

Without that a result would lack what was asked for, or a promise of less memory be forgotten, and nothing would tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, GenerationConfig, PreTrainedModel

import tilewright as tw

from .hf_engine import eager_decoder, eager_encoder
from .models import tiny

PROMPT = torch.tensor([[5, 17, 99, 23, 42, 8, 61]])
FLAGS = ("output_hidden_states", "output_attentions", "output_router_logits")
DICT: dict[str, Any] = {"return_dict_in_generate": True, "pad_token_id": 0, "max_new_tokens": 3}


@pytest.fixture
def llama() -> tuple[PreTrainedModel, Any]:
    model = tiny("llama")
    model.set_attn_implementation("eager")  # else Transformers itself refuses config.output_attentions
    return model, eager_decoder(model)


@pytest.fixture(params=FLAGS)
def flag(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Outputs


def test_a_config_with_extra_outputs_is_refused_at_compile(
    llama: tuple[PreTrainedModel, Any], flag: str
) -> None:
    model, _ = llama
    setattr(model.config, flag, True)
    with pytest.raises(tw.OptionError, match=rf"model\.config\.{flag} .*set it to False"):
        tw.compile(model, backend="cpp", autotune="off")


def test_so_is_the_config_of_a_model_within() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "output_hidden_states": True}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4})
    ).eval()
    with pytest.raises(tw.OptionError, match=r"model\.text_model\.config\.output_hidden_states"):
        tw.compile(model, backend="cpp", autotune="off")


def test_a_module_with_example_inputs_gives_them() -> None:
    """Such a module is captured with all that it returns, so that its config may say what it likes."""
    model = tiny("bert")
    model.config.output_hidden_states = True
    fast = tw.compile(model, {"input_ids": PROMPT}, backend="reference", autotune="off")
    with torch.no_grad():
        expected = model(input_ids=PROMPT).hidden_states
    found = fast(input_ids=PROMPT).hidden_states
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


CALLS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda f: f(PROMPT),
    "generate": lambda f: f.generate(PROMPT, pad_token_id=0, max_new_tokens=3),
    "generate a dict": lambda f: f.generate(PROMPT, **DICT),
    "beams": lambda f: f.generate(PROMPT, num_beams=2, **DICT),
    "generate without": lambda f: f.generate(PROMPT, **dict.fromkeys(FLAGS[:2], False), **DICT),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_config_that_changes_later_is_refused_at_the_call(
    llama: tuple[PreTrainedModel, Any], flag: str, call: str
) -> None:
    model, fast = llama
    setattr(model.config, flag, True)
    with pytest.raises(tw.InputError, match=rf"config\.{flag} asks for outputs"):
        CALLS[call](fast)
    setattr(model.config, flag, False)
    CALLS[call](fast)


def test_a_call_may_decline_what_the_config_asks_for(llama: tuple[PreTrainedModel, Any], flag: str) -> None:
    model, fast = llama
    expected = fast(PROMPT).logits
    setattr(model.config, flag, True)
    assert torch.equal(fast(PROMPT, **{flag: False}).logits, expected)


def test_encoders_refuse_as_well(flag: str) -> None:
    model = tiny("bert")
    model.set_attn_implementation("eager")
    fast = eager_encoder(model)
    with pytest.raises(tw.InputError, match=f"does not take {flag}"):
        fast(PROMPT, **{flag: True})
    setattr(model.config, flag, True)
    with pytest.raises(tw.InputError, match=rf"config\.{flag} asks for outputs"):
        fast(PROMPT)


@pytest.mark.parametrize("flag", FLAGS[:2])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_generation_with_extra_outputs_is_refused(
    llama: tuple[PreTrainedModel, Any], flag: str, beams: int
) -> None:
    """As a keyword, in an object, and in the model's own generation config."""
    _, fast = llama
    options = {**DICT, flag: True, "num_beams": beams}
    with pytest.raises(tw.InputError, match=f"does not take {flag}"):
        fast.generate(PROMPT, **options)
    with pytest.raises(tw.InputError, match=f"does not take {flag}"):
        fast.generate(PROMPT, generation_config=GenerationConfig(**options))
    setattr(fast.generation_config, flag, True)
    with pytest.raises(tw.InputError, match=f"does not take {flag}"):
        fast.generate(PROMPT, num_beams=beams, **DICT)


def test_scores_and_logits_are_no_extra_outputs(llama: tuple[PreTrainedModel, Any]) -> None:
    """They are made of the logits, in Transformers' loop."""
    expected, found = (m.generate(PROMPT, **DICT, output_scores=True, output_logits=True) for m in llama)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Caches


@pytest.fixture(params=["keyword", "object", "default"])
def generate(request: pytest.FixtureRequest, llama: tuple[PreTrainedModel, Any]) -> Callable[..., Any]:
    """generate(), told its cache implementation in each of the three ways."""
    _, fast = llama

    def run(implementation: str) -> Any:
        options = {"cache_implementation": implementation, "max_new_tokens": 3, "pad_token_id": 0}
        if request.param == "keyword":
            return fast.generate(PROMPT, **options)
        if request.param == "object":
            return fast.generate(PROMPT, generation_config=GenerationConfig(**options))
        fast.generation_config.cache_implementation = implementation
        return fast.generate(PROMPT, max_new_tokens=3, pad_token_id=0)

    return run


@pytest.mark.parametrize(
    ("implementation", "remedy"),
    [
        ("quantized", "kv_cache='fp8'"),
        ("offloaded", "smaller max_length"),
        ("offloaded_static", "smaller max_length"),
        ("paged", "leave cache_implementation out"),
    ],
)
def test_caches_that_promise_memory_are_refused(
    generate: Callable[..., Any], implementation: str, remedy: str
) -> None:
    with pytest.raises(tw.InputError, match=rf"cache_implementation='{implementation}'.*{remedy}"):
        generate(implementation)


@pytest.mark.parametrize("implementation", ["static", "dynamic", "hybrid"])
def test_caches_that_promise_a_result_give_it(
    generate: Callable[..., Any], implementation: str, llama: tuple[PreTrainedModel, Any]
) -> None:
    expected = llama[0].generate(PROMPT, max_new_tokens=3, pad_token_id=0)
    assert torch.equal(generate(implementation), expected)
