"""Experts in captured models: one op, whatever the model, with a router of ordinary ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import tilewright as tw
from tilewright.capture import capture
from tilewright.capture_experts import find_gate
from tilewright.ir.experts import Gate
from tilewright.lower import lower
from tilewright.passes.pipeline import run_passes

from .test_architectures import DECODERS, prompt, random

# Kernels of a prefill layer: attention takes 3 to 15 of them, the router 4 or 5, experts and the residual 2.
KERNELS = {"mixtral": 11, "qwen3_moe": 13, "gpt_oss": 10, "deepseek_v3": 25}


@pytest.mark.parametrize("name", KERNELS)
def test_a_layer_has_one_op_for_its_experts(name: str) -> None:
    model = random(DECODERS[name], hf.AutoModelForCausalLM)
    module = lower(capture(model))
    layer = module.functions[-1]
    assert [op.opcode for op in layer.ops].count("experts") == 1
    routed = [op for f in module.functions for op in f.ops if op.loc.module.startswith("mlp")]
    assert routed
    assert not any(op.opcode == "call_torch" for op in routed)
    kernels = [op for op in run_passes(module).functions[-1].ops if op.opcode == "kernel"]
    assert len(kernels) <= KERNELS[name]


def test_gates_are_told_apart() -> None:
    """A gate of another kind would compute something else without a word."""
    found = {}
    for name in KERNELS:
        model = random(DECODERS[name], hf.AutoModelForCausalLM)
        found[name] = [find_gate(m) for m in model.modules() if hasattr(m, "_apply_gate")][-1]
    plain = Gate("silu")
    assert found == {
        "mixtral": plain,
        "qwen3_moe": plain,
        "deepseek_v3": plain,
        "gpt_oss": Gate("silu", 1.702, 7.0, 1.0, True),
    }


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_other_activations(activation: str) -> None:
    check(hf.MixtralConfig(**{**DECODERS["mixtral"].to_dict(), "hidden_act": activation}), experts=1)


@pytest.mark.parametrize("activation", ["relu2", "mish"])
def test_a_gate_that_the_op_does_not_have_stays_the_models_own(activation: str) -> None:
    check(hf.MixtralConfig(**{**DECODERS["mixtral"].to_dict(), "hidden_act": activation}), experts=0)


def check(config: Any, experts: int) -> None:
    """A model that has so many experts ops in its layer says what Hugging Face says."""
    model = random(config, hf.AutoModelForCausalLM)
    module = lower(capture(model))
    assert [op.opcode for f in module.functions for op in f.ops].count("experts") == experts
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend="reference", autotune="off")
    ids, mask = prompt()
    with torch.no_grad():
        expected: Tensor = model(input_ids=ids, attention_mask=mask).logits
        found = fast(input_ids=ids, attention_mask=mask).logits
    kept = mask.bool()
    largest = expected.abs().max().item()
    torch.testing.assert_close(found[kept], expected[kept], rtol=2e-4, atol=2e-5 * largest)


def test_a_model_keeps_its_implementation() -> None:
    model = random(DECODERS["mixtral"], hf.AutoModelForCausalLM)
    before = model.config._experts_implementation
    capture(model)
    assert model.config._experts_implementation == before
    assert "tilewright" not in ALL_EXPERTS_FUNCTIONS
