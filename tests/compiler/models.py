"""Tiny randomly initialised Hugging Face models of the families under test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

DECODERS = ("llama", "opt", "gpt2")


def tiny(family: str, layers: int = 2) -> PreTrainedModel:
    """A model with hidden size 64 and 128 tokens whose weights are large enough for outputs to differ."""
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4, "hidden_size": 64}
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                **shape,
                intermediate_size=96,
                num_key_value_heads=2,
                max_position_embeddings=256,
                tie_word_embeddings=True,
            )
        )
    elif family == "opt":
        model = OPTForCausalLM(
            OPTConfig(**shape, ffn_dim=96, max_position_embeddings=256, word_embed_proj_dim=64)
        )
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=128, n_layer=layers, n_head=4, n_embd=64, n_positions=256)
        )
    elif family == "mamba":
        model = MambaForCausalLM(
            MambaConfig(vocab_size=128, num_hidden_layers=layers, hidden_size=64, state_size=8)
        )
    elif family == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=128, n_layer=layers, n_head=4, hidden_size=64))
    else:
        model = BertModel(BertConfig(**shape, intermediate_size=96, max_position_embeddings=256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def random(config: PretrainedConfig, kind: Any) -> PreTrainedModel:
    """A model with weights large enough for its tokens to differ, sinks and biases among them.

    ``kind`` is a model class, or one of transformers' auto classes.
    """
    torch.manual_seed(0)
    make = kind if issubclass(kind, PreTrainedModel) else kind.from_config
    model: PreTrainedModel = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
