"""PEFT's adapters on a compiled model: Hugging Face's results for each of them, switched without a compilation."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import tilewright as tw
from tests.compiler.models import tiny

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
GIVEN = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def with_adapters(model: Any, **more: Any) -> Any:
    """The model with adapters ``a`` and ``b`` of random values."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **more}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config), adapter_name="a")
    wrapped.add_adapter("b", peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


@pytest.fixture(scope="module", params=["before", "after"])
def models(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """A compiled model, its original with adapters added before or after compilation, and one that stays PEFT's."""
    model = tiny("llama")
    reference = with_adapters(copy.deepcopy(model))
    options = {"batch_sizes": (2,), "max_length": 64, "backend": "cpp", "autotune": "off"}
    if request.param == "before":
        ours = with_adapters(model)
        return tw.compile(ours, **options), ours, reference
    fast = tw.compile(model, **options)
    return fast, with_adapters(model), reference


@torch.no_grad()
def apart(fast: Any, reference: Any) -> float:
    return (fast(input_ids=IDS).logits - reference(input_ids=IDS).logits).abs().max().item()


def test_each_adapter_gives_hugging_faces_results(models: tuple[Any, Any, Any]) -> None:
    fast, ours, reference = models
    seen = []
    for name in ("a", "b", "a"):
        ours.set_adapter(name)
        reference.set_adapter(name)
        found = fast.generate(IDS, **GIVEN)
        assert torch.equal(found, reference.generate(input_ids=IDS, **GIVEN))
        assert apart(fast, reference) < 2e-5
        assert apart(ours, reference) < 2e-5
        seen.append(found)
    assert not torch.equal(seen[0], seen[1])
    assert fast.report().compiled_while_running == 0


def test_without_adapters_the_weights_are_exactly_the_base(models: tuple[Any, Any, Any]) -> None:
    """However often adapters were added and taken away."""
    fast, ours, reference = models
    for name in ("a", "b"):
        ours.set_adapter(name)
        fast(input_ids=IDS)
    with ours.disable_adapter(), reference.disable_adapter():
        assert apart(fast, reference) < 2e-5
        for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    reference.set_adapter("b")
    assert apart(fast, reference) < 2e-5


def test_several_adapters_at_once(models: tuple[Any, Any, Any]) -> None:
    fast, ours, reference = models
    for each in (ours, reference):
        each.base_model.set_adapter(["a", "b"])
    assert apart(fast, reference) < 2e-5


def test_an_adapter_that_makes_a_new_weight_reaches_the_kernels() -> None:
    """DoRA replaces the tensor that the kernels read."""
    model = tiny("llama")
    reference = with_adapters(copy.deepcopy(model), use_dora=True)
    ours = with_adapters(model, use_dora=True)
    fast = tw.compile(ours, batch_sizes=(2,), max_length=64, backend="reference")
    for name in ("b", "a"):
        ours.set_adapter(name)
        reference.set_adapter(name)
        assert apart(fast, reference) < 2e-5


def test_quantised_weights_keep_the_adapters_they_were_made_with() -> None:
    model = tiny("llama")
    options: dict[str, Any] = {"max_length": 64, "backend": "reference", "weights": "int8"}
    fast = tw.compile(model, **options)
    fast(input_ids=IDS[:1])
    ours = with_adapters(model)
    with pytest.raises(
        tw.InputError, match=r"q_proj were changed to a, .*copy of its weight in another form"
    ):
        fast(input_ids=IDS[:1])
    with ours.disable_adapter():
        fast(input_ids=IDS[:1])
    adapted = tw.compile(ours, **options)
    with torch.no_grad():
        exact = ours(input_ids=IDS[:1]).logits
    assert (adapted(input_ids=IDS[:1]).logits - exact).abs().max() < 0.1 * exact.abs().max()
    with ours.disable_adapter(), pytest.raises(tw.InputError, match="changed to none"):
        adapted(input_ids=IDS[:1])


def test_tokens_before_the_prompt_are_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(tiny("llama"), config).eval()
    with pytest.raises(tw.CaptureError, match=r"PROMPT_TUNING put tokens before the prompt.*get_base_model"):
        tw.compile(wrapped, backend="reference")
