"""The models that the field's charts are drawn for, in their real shapes and without their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from tilewright.errors import OptionError


def _llama(layers: int, hidden: int, inner: int, heads: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=4096,
        )
    )


def _opt(layers: int) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=4096,
            word_embed_proj_dim=4096,
            ffn_dim=16384,
            num_hidden_layers=layers,
            num_attention_heads=32,
        )
    )


BUILDERS: Mapping[str, Callable[[int], PreTrainedModel]] = {
    "llama2-7b": lambda layers: _llama(layers or 32, 4096, 11008, 32),
    "llama2-13b": lambda layers: _llama(layers or 40, 5120, 13824, 40),
    "opt-6.7b": lambda layers: _opt(layers or 32),
}
"""Name -> model with a number of layers, 0 for its own."""


def without_values(name: str, layers: int = 0) -> PreTrainedModel:
    """A model in bfloat16 whose weights are never touched, so that its gigabytes take no memory.

    layers: fewer than the model has, for what is the same in each. Raises OptionError for a name that is not among
    ``BUILDERS``.
    """
    if name not in BUILDERS:
        raise OptionError(f"model '{name}' is none of {', '.join(BUILDERS)}")
    with torch.device("meta"):
        model = BUILDERS[name](layers)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.tie_weights()  # to_empty gives each parameter memory of its own
    return model
