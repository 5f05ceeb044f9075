"""Encoders of images, alone and beside one of texts: small random models, and Hugging Face's own results.

Batches are larger than what is compiled, where rows do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

import tilewright as tw

from .models import random

_SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
_VISION = {**_SHAPE, "image_size": 32, "patch_size": 8}
_TEXT = {**_SHAPE, "vocab_size": 128, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 7}

_WINDOWS = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip

MODELS: dict[str, tuple[Any, hf.PretrainedConfig]] = {
    "vit": (hf.ViTModel, hf.ViTConfig(**_VISION)),
    "vit_classes": (hf.ViTForImageClassification, hf.ViTConfig(**_VISION, num_labels=5)),
    "vit_oblong": (hf.ViTModel, hf.ViTConfig(**{**_VISION, "image_size": (16, 32), "num_channels": 1})),
    "clip_vision": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**_VISION)),
    "clip_vision_projected": (
        hf.CLIPVisionModelWithProjection,
        hf.CLIPVisionConfig(**_VISION, projection_dim=48),
    ),
    "clip_text": (hf.CLIPTextModel, hf.CLIPTextConfig(**_TEXT)),
    "clip_text_old_end": (hf.CLIPTextModel, hf.CLIPTextConfig(**{**_TEXT, "eos_token_id": 2})),
    "deit": (hf.DeiTModel, hf.DeiTConfig(**_VISION)),
    "beit": (hf.BeitModel, hf.BeitConfig(**_VISION)),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config(**_VISION)),
    "siglip_vision": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**_VISION)),
    "swin": (hf.SwinModel, hf.SwinConfig(**_WINDOWS)),
    "swinv2": (hf.Swinv2Model, hf.Swinv2Config(**_WINDOWS)),
    "convnext": (
        hf.ConvNextModel,
        hf.ConvNextConfig(image_size=32, num_stages=2, hidden_sizes=[16, 32], depths=[1, 2]),
    ),
}
PAIRS: dict[str, tuple[Any, hf.PretrainedConfig]] = {
    "clip": (hf.CLIPModel, hf.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=48)),
    "siglip": (hf.SiglipModel, hf.SiglipConfig(text_config=_TEXT, vision_config=_VISION)),
}


def build(name: str) -> PreTrainedModel:
    kind, config = (MODELS | PAIRS)[name]
    return random(config, kind)


def images(count: int, config: Any = None) -> Tensor:
    shape = (3, 32, 32) if config is None else (config.num_channels, *config.image_size)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


def texts(count: int) -> dict[str, Tensor]:
    ids = torch.randint(8, 128, (count, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[0, 5], mask[0, 6:] = 7, 0
    return {"input_ids": ids, "attention_mask": mask}


def check(model: PreTrainedModel, fast: Any, **inputs: Tensor) -> tuple[ModelOutput, ModelOutput]:
    """Our result and Hugging Face's, which are the same."""
    with torch.no_grad():
        expected = model(**inputs)
    found = fast(**inputs)
    _same(found, expected)
    assert len(fast(**inputs, return_dict=False)) == len(expected.to_tuple())
    return found, expected


def tensors(output: ModelOutput) -> list[Tensor]:
    """All tensors of a result, of the towers in it too."""
    return [t for v in output.values() for t in (tensors(v) if isinstance(v, ModelOutput) else [v])]


def _same(found: ModelOutput, expected: ModelOutput) -> None:
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, ModelOutput):
            _same(found[name], value)
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_says_what_hugging_face_says(name: str, record_architecture: Callable[..., None]) -> None:
    fast, found, expected = check_encoder(name, "reference")
    kind = "encoder of texts" if "text" in name else "encoder of images"
    record_architecture(name, kind, fast.report(), tensors(found), tensors(expected))


@pytest.mark.parametrize(
    "name", ["vit", "vit_oblong", "clip_vision", "clip_text", "siglip_vision", "swin", "convnext"]
)
def test_and_so_do_generated_kernels(name: str) -> None:
    check_encoder(name, "cpp")


def check_encoder(name: str, backend: str) -> tuple[Any, ModelOutput, ModelOutput]:
    model = build(name)
    fast = tw.compile(model, batch_sizes=(2,), backend=backend, autotune="off")
    oblong = model.config if name == "vit_oblong" else None
    for count in (1, 5):
        inputs = texts(count) if "text" in name else {"pixel_values": images(count, oblong)}
        found, expected = check(model, fast, **inputs)
    if "text" not in name:
        assert not fast.report().fallbacks
        assert len(fast._tilewright.engine.spec.inputs) == 1
    return fast, found, expected


@pytest.mark.parametrize(
    ("name", "backend"), [("clip", "reference"), ("clip", "cpp"), ("siglip", "reference")]
)
def test_texts_and_images_together(name: str, backend: str, record_architecture: Callable[..., None]) -> None:
    """Each text with each image; the results of both towers nest in that of the whole."""
    model = build(name)
    fast = tw.compile(model, batch_sizes=(3,), backend=backend, autotune="off")
    found, expected = check(model, fast, pixel_values=images(3), **texts(2))
    if backend == "reference":
        kind = "encoders of texts and images"
        record_architecture(name, kind, fast.report(), tensors(found), tensors(expected))
    assert found.logits_per_text.shape == (2, 3)
    check(model, fast, pixel_values=images(1), **texts(3))
    with pytest.raises(tw.InputError, match="dim I is 4, but this model takes 1 to 3"):
        fast(pixel_values=images(4), **texts(2))
    with pytest.raises(tw.InputError, match="pixel_values is missing"):
        fast(**texts(2))
    with pytest.raises(tw.InputError, match="return_loss"):
        fast(pixel_values=images(2), return_loss=True, **texts(2))


@pytest.fixture(scope="module")
def vit() -> tuple[PreTrainedModel, Any]:
    model = build("vit")
    return model, tw.compile(model, backend="reference")


def test_arguments_are_those_of_the_original(vit: tuple[PreTrainedModel, Any]) -> None:
    model, fast = vit
    with torch.no_grad():
        _same(fast(images(2)), model(images(2)))
    _same(fast(images(2), None, False), model(images(2)))
    for wrong, message in (
        ({}, "pixel_values is missing"),
        ({"pixel_values": images(1)[:, :, :16]}, r"pixel_values must be of shape \[B|1, 3, 32, 32\]"),
        ({"pixel_values": images(1).long()}, "pixel_values must be of dtype torch.float32"),
        ({"pixel_values": images(1), "interpolate_pos_encoding": True}, "interpolate_pos_encoding"),
        ({"pixel_values": images(1), "bool_masked_pos": torch.ones(1, 16)}, "bool_masked_pos"),
        ({"pixel_values": images(1), "output_attentions": True}, "output_attentions"),
    ):
        with pytest.raises(tw.InputError, match=message):
            fast(**wrong)
    with pytest.raises(tw.InputError, match="do not fit"):
        fast(images(1), pixel_values=images(1))


def test_images_come_in_any_float() -> None:
    """Processors give float32; the model rounds it to its own dtype."""
    model = build("vit").to(torch.bfloat16)
    fast = tw.compile(model, backend="reference")
    exact = build("vit").to(torch.bfloat16).double()
    with torch.no_grad():
        expected = exact(images(1).bfloat16().double()).last_hidden_state
        eager = model(images(1)).last_hidden_state
    found = fast(images(1)).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fast(images(1).bfloat16()).last_hidden_state)
    assert (found - expected).norm() <= 1.5 * (eager - expected).norm() + 1e-3 * expected.norm()


def test_the_patch_embedding_is_quantised_as_other_products_are() -> None:
    fast = tw.compile(build("vit"), weights="int8", backend="reference")
    codes = [line for line in fast.ir("forward").splitlines() if "int8.codes" in line]
    assert any("patch_embeddings.projection.weight" in line for line in codes)


def test_a_config_without_image_sizes_asks_for_an_example() -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    with pytest.raises(tw.CaptureError, match=r"which images it takes.*pass example_inputs="):
        tw.compile(random(config, hf.ResNetModel), backend="reference")
