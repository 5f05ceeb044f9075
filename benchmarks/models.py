"""The models that are measured, by name, and the precisions that they are measured at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tilewright as tw
from tilewright import pretrained
from tilewright.progress import SILENT, Progress


@dataclass(frozen=True)
class Precision:
    """What a precision means to each system.

    dtype: of the Hugging Face model. weights: tilewright's option of that name. gguf: the file type of llama.cpp.
    """

    dtype: torch.dtype
    weights: str | None
    gguf: str


PRECISIONS = {
    "f32": Precision(torch.float32, None, "F32"),
    "bf16": Precision(torch.bfloat16, None, "BF16"),
    "int8": Precision(torch.bfloat16, "int8", "Q8_0"),
    "int4": Precision(torch.bfloat16, "int4", "Q4_0"),
}


def load(name: str, precision: str, progress: Progress = SILENT) -> PreTrainedModel:
    """The Hugging Face model that a precision starts from, by a name of ``pretrained.load`` or "tiny".

    "tiny" has random weights and is there to try the benchmark. For int8 and int4 this is the model in
    bfloat16, as most are published, so that keys and values take two bytes.
    """
    dtype = PRECISIONS[precision].dtype
    if name == "tiny":
        return tiny_llama(dtype)
    model, _ = pretrained.load(name, dtype, progress)
    return model


def compiled(source: PreTrainedModel, precision: str, **options: Any) -> Any:
    """``source`` as ``load`` gave it for that precision, compiled by tilewright."""
    return tw.compile(source, weights=PRECISIONS[precision].weights, **options)


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


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one decode step has to read.

    An embedding table is only read where it also is the output matrix; of the others a step reads one row.
    """
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if table.data_ptr() != head.data_ptr():
        del weights[table.data_ptr()]
    return sum(weights.values())


def kv_bytes(model: PreTrainedModel, itemsize: int) -> int:
    """Bytes of keys and values of one position, each number taking ``itemsize`` bytes."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * heads * size * itemsize


def bytes_per_step(model: PreTrainedModel, context: int, batch: int = 1) -> int:
    """Bytes that one decode step has to read: every weight once, and the keys and values of ``context`` positions of
    each sequence."""
    itemsize = model.get_output_embeddings().weight.element_size()
    return weight_bytes(model) + batch * context * kv_bytes(model, itemsize)


def tokenizer(name: str) -> Any:
    """The tokenizer of a model; that of "tiny" takes bytes for tokens."""
    if name == "tiny":
        return _bytes_as_tokens
    _, found = pretrained.load(name)
    return found


def _bytes_as_tokens(text: str, **_options: Any) -> dict[str, list[int]]:
    return {"input_ids": [byte % 128 for byte in text.encode()]}
