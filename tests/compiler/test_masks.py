"""Which keys a query sees is what the mask says that a model makes, as in eager PyTorch, and not what a module passes
beside it; and whether layers are alike depends on the masks that they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

import tilewright as tw

from .models import random, tiny
from .test_architectures import DECODERS, check_encoder, prompt


def _check(model: Any) -> Any:
    """The compiled model, whose logits for a prompt longer than any window are the model's own."""
    fast = tw.compile(model, batch_sizes=(2,), max_length=64, backend="reference", autotune="off")
    ids, mask = prompt()
    with torch.no_grad():
        found, expected = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (fast, model))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5 * expected.abs().max().item())
    return fast


def test_a_window_that_the_module_does_not_pass() -> None:
    config = hf.PhimoeConfig(**_PHIMOE, sliding_window=16)
    assert "window = 16" in _check(random(config, hf.AutoModelForCausalLM)).ir("lowered")


_PHIMOE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def test_a_window_that_only_the_module_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = modeling_mistral.create_causal_mask
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", causal)
    fast = _check(random(DECODERS["mistral"], hf.AutoModelForCausalLM))
    assert "window = 0" in fast.ir("lowered")


def test_layers_that_differ_in_their_mask_alone_are_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama each second layer of which is called with a window's mask."""
    causal = modeling_llama.create_causal_mask
    windowed = modeling_mistral.create_sliding_window_causal_mask
    called = modeling_llama.LlamaDecoderLayer.__call__

    def masks(**kwargs: Any) -> Any:
        return causal(**kwargs), windowed(**kwargs)

    def call(layer: Any, x: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        mask = attention_mask[layer.self_attn.layer_idx % 2]
        return called(layer, x, attention_mask=mask, **kwargs)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", masks)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__call__", call)
    model = tiny("llama", layers=4)
    model.config.sliding_window = 5
    fast = _check(model)
    text = fast.ir("lowered")
    assert text.count("func @layer") == text.count("window = 5") + 1 == 2


def test_an_encoder_whose_window_is_on_both_sides() -> None:
    config = hf.ModernBertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
        local_attention=8, bos_token_id=1, eos_token_id=2, pad_token_id=0, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    for backend in ("reference", "cpp"):
        fast, _, _ = check_encoder(random(config, hf.AutoModel), backend)
        assert "distances" in fast.ir("lowered")
