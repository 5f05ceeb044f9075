"""Small random models that take images beside texts, and prompts for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

import tilewright as tw

from .models import random

IMAGE = 100
"""The token that stands for a piece of an image."""
_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {
    **_SHAPE, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_VISION = {**_SHAPE, "image_size": 16, "patch_size": 4}
_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_GRID = {"depth": 2, "num_heads": 4, "patch_size": 4, "hidden_size": 32}
_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
}  # fmt: skip

CONFIGS: dict[str, hf.PretrainedConfig] = {
    "llava": hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION, projection_dim=32),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
    ),
    "idefics3": hf.Idefics3Config(
        text_config=hf.LlamaConfig(**_TEXT), vision_config=_VISION, image_token_id=IMAGE, scale_factor=2
    ),
    "qwen2_vl": hf.Qwen2VLConfig(
        text_config={**_TEXT, "rope_parameters": _AXES},
        vision_config={**_GRID, "embed_dim": 32, "mlp_ratio": 2},
        **_TOKENS,
    ),
    "qwen3_5": hf.Qwen3_5Config(
        text_config={**_TEXT, **_LINEAR, "rope_parameters": {**_AXES, "partial_rotary_factor": 1.0}},
        vision_config={**_GRID, "out_hidden_size": 32, "intermediate_size": 64},
        **_TOKENS,
    ),
    "qwen3_vl": hf.Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 8, "rope_parameters": _AXES},
        vision_config={
            **_GRID, "out_hidden_size": 32, "intermediate_size": 64, "deepstack_visual_indexes": [0, 1],
        },
        **_TOKENS,
    ),
    "gemma3": hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(
            **_TEXT,
            head_dim=8,
            sliding_window=6,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=hf.SiglipVisionConfig(**_VISION),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
    "paligemma": hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**_TEXT, head_dim=8),
        vision_config=hf.SiglipVisionConfig(**_VISION),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    ),
}  # fmt: skip
_LENGTHS = {"llava": 16, "idefics3": 4, "gemma3": 4, "paligemma": 16}
_COUNTED = ("qwen2_vl", "qwen3_5", "qwen3_vl")
"""Models in which images have positions of their own."""


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return random(CONFIGS[name], hf.AutoModelForImageTextToText).to(dtype)


@cache
def compiled(name: str, backend: str = "cpp", dtype: torch.dtype = torch.float32) -> Any:
    sizes = (1, 6) if backend == "cpp" else (2,)
    return tw.compile(
        model_of(name, dtype), max_length=96, batch_sizes=sizes, backend=backend, autotune="off"
    )


def prompts(name: str, seed: int = 0, rows: int = 2) -> dict[str, Tensor]:
    """Texts around an image each, of which the second is shorter and padded on the left."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.full((_LENGTHS.get(name, 8),), IMAGE)
    before, after = (torch.randint(3, 90, (rows, n), generator=draw) for n in (6, 5))
    ids = torch.stack([torch.cat([b, image, a]) for b, a in zip(before, after, strict=True)])
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[1, :4], mask[1, :4] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    if name in _COUNTED:
        ids[:, 5] = _TOKENS["vision_start_token_id"]  # by which beams count images, up to Transformers 5.17
        pixels = torch.randn(32 * rows, 3 * 2 * 4 * 4, generator=draw)
        grid = torch.tensor([[1, 4, 8]] * rows)
        return found | {
            "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()
        }  # fmt: skip
    shape = (rows, 1, 3, 16, 16) if name == "idefics3" else (rows, 3, 16, 16)
    found["pixel_values"] = torch.randn(*shape, generator=draw)
    types = {"gemma3": (ids == IMAGE).int(), "paligemma": torch.zeros_like(ids)}
    return found | ({"token_type_ids": types[name]} if name in types else {})
