"""The models that the field's charts are drawn for, in their real shapes and without their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from tilewright.errors import OptionError


def _llama(
    layers: int, hidden: int, inner: int, heads: int, positions: int, words: int = 32000
) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=max(4096, positions),
        )
    )


def _opt(
    layers: int, hidden: int, inner: int, heads: int, positions: int, words: int = 50272
) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=words,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=max(2048, positions),
        )
    )


BUILDERS: Mapping[str, Callable[[int, int], PreTrainedModel]] = {
    "llama2-7b": lambda layers, positions: _llama(layers or 32, 4096, 11008, 32, positions),
    "llama2-13b": lambda layers, positions: _llama(layers or 40, 5120, 13824, 40, positions),
    "opt-6.7b": lambda layers, positions: _opt(layers or 32, 4096, 16384, 32, positions),
}
"""Name -> model with a number of layers (0: its own) and room for positions (0: its own)."""

TINY: Mapping[str, Callable[[int, int], PreTrainedModel]] = {
    "tiny-llama": lambda layers, positions: _llama(layers or 1, 64, 96, 4, positions, 2048),
    "tiny-opt": lambda layers, positions: _opt(layers or 1, 64, 96, 4, positions, 2048),
}
"""The same families, small enough to run anywhere."""


def without_values(name: str, layers: int = 0) -> PreTrainedModel:
    """A model in bfloat16 whose weights are never touched, so that its gigabytes take no memory.

    layers: fewer than the model has, for what is the same in each. Raises OptionError for a name that is not among
    ``BUILDERS``.
    """
    if name not in BUILDERS:
        raise OptionError(f"model '{name}' is none of {', '.join(BUILDERS)}")
    with torch.device("meta"):
        model = BUILDERS[name](layers, 0)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.tie_weights()  # to_empty gives each parameter memory of its own
    return model


def with_random_values(name: str, device: torch.device, positions: int) -> PreTrainedModel:
    """A model in bfloat16 with random weights, made on ``device``, with room for ``positions``."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = {**BUILDERS, **TINY}[name](0, positions)
    finally:
        torch.set_default_dtype(before)
    return model.eval()
