"""The encoders that are measured, by name, and what they are given."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.models import PRECISIONS
from tilewright import pretrained

_CONFIGS: dict[str, PretrainedConfig] = {
    "bert": hf.BertConfig(),
    "modernbert": hf.ModernBertConfig(),
    "vit": hf.ViTConfig(),
    "tiny": hf.BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    ),
}
"""Of the sizes that models are published in under these names ("base"); their weights are random."""

NAMES = ("minilm", *_CONFIGS)


def load(name: str, precision: str) -> PreTrainedModel:
    """The Hugging Face model that a precision starts from; that of "minilm" has its real weights."""
    dtype = PRECISIONS[precision].dtype
    if name == "minilm":
        model, _ = pretrained.load_minilm(dtype)
        return model
    torch.manual_seed(0)
    found: PreTrainedModel = hf.AutoModel.from_config(_CONFIGS[name]).eval().to(dtype)
    return found


def takes_images(model: PreTrainedModel) -> bool:
    """Whether it reads pixels, of one size, in place of tokens."""
    return bool(model.main_input_name == "pixel_values")


def inputs(model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Tensor]:
    """A batch, the same at every run: ids and mask i64[rows, tokens] without padding, or images [rows, 3, H, W]."""
    generator = torch.Generator().manual_seed(tokens)
    config: Any = model.config
    if takes_images(model):
        shape = (rows, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(model.device, model.dtype)}
    ids = torch.randint(3, config.vocab_size, (rows, tokens), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
