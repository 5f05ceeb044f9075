"""The models that are measured, by name."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tilewright import pretrained
from tilewright.progress import SILENT, Progress

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def load(name: str, dtype: str, progress: Progress = SILENT) -> PreTrainedModel:
    """A model in "f32" or "bf16": "tiny" (random weights, to try the benchmark), or a name for ``pretrained.load``."""
    if name == "tiny":
        return tiny_llama(DTYPES[dtype])
    model, _ = pretrained.load(name, DTYPES[dtype], progress)
    return model


def tiny_llama(dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def prompt(model: PreTrainedModel, length: int) -> torch.Tensor:
    """Token ids i64[1, length], the same at every run; which tokens they are does not matter to speed."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, model.config.vocab_size, (1, length), generator=generator)


def bytes_per_token(model: PreTrainedModel, context: int) -> int:
    """Bytes that one decode step has to read: every weight once, and the keys and values of ``context`` positions.

    An embedding table is only read where it also is the output matrix; of the others a step reads one row.
    """
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if table.data_ptr() != head.data_ptr():
        del weights[table.data_ptr()]
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = config.num_hidden_layers * 2 * heads * size * head.element_size()
    return sum(weights.values()) + context * row
