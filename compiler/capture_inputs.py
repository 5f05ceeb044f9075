"""What a Hugging Face model is fed: its kind, and its tensor inputs with dtypes and dims."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
import transformers
from transformers import PreTrainedModel

from tilewright.ir.errors import CaptureError

from .capture_ops import configs_of

Kind = Literal["decoder", "encoder", "module"]
Inputs: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[str | int, ...]]]
"""Inputs by name: dtype and dims. B counts texts, or images where there are no texts; I counts images beside texts."""

MAX_BATCH = 4096
_MAX_LENGTH = 1 << 20  # where the config states no limit


def model_kind(model: PreTrainedModel) -> Kind:
    """A decoder keeps state between calls: it takes past_key_values and its attention is causal, or it takes
    cache_params, since it is recurrent. The rest are encoders."""
    known = inspect.signature(model.forward).parameters
    if is_recurrent(model):
        return "decoder"
    if "past_key_values" not in known:
        if "cache" in known:
            raise CaptureError(
                f"{type(model).__name__} takes its KV state as cache=, as models of Transformers 5.24 and later do "
                f"(this is {transformers.__version__}); install 'transformers<5.24'"
            )
        return "encoder"
    flags = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    causal = any(flags) if flags else model.can_generate()
    return "decoder" if causal else "encoder"


def is_recurrent(model: PreTrainedModel) -> bool:
    """True for a model whose state is not (only) keys and values: it takes that as cache_params."""
    return "cache_params" in inspect.signature(model.forward).parameters


def attends_to_an_encoder(model: PreTrainedModel) -> bool:
    """True for an encoder-decoder, and for the decoder of one; False for its encoder, whose config says the same."""
    whole = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return bool(model.config.is_encoder_decoder) and (whole or model_kind(model) == "decoder")


def model_inputs(model: PreTrainedModel, kind: Kind) -> Inputs:
    """The inputs that a model is captured with. Masks are boolean from the start: 2-D, over the whole context.

    Raises CaptureError for an encoder of images whose config does not say how large they are.
    """
    known = inspect.signature(model.forward).parameters
    inputs: dict[str, tuple[torch.dtype, tuple[str | int, ...]]] = {}
    if "input_ids" in known:
        inputs["input_ids"] = (torch.int64, ("B", "S"))
    if kind == "decoder" and "position_ids" in known:
        inputs["position_ids"] = (torch.int64, ("B", "S"))
    if kind == "encoder" and "pixel_values" in known:
        inputs["pixel_values"] = (model.dtype, ("I" if inputs else "B", *_image_shape(model)))
    if "input_ids" in known:
        inputs["attention_mask"] = (torch.bool, ("B", "T" if kind == "decoder" else "S"))
    if kind == "encoder" and "token_type_ids" in known:
        inputs["token_type_ids"] = (torch.int64, ("B", "S"))
    return inputs


def symbol_ranges(model: PreTrainedModel, inputs: Inputs) -> dict[str, tuple[int, int]]:
    """Least and largest size of each symbol in the inputs' dims."""
    names = {dim for _, shape in inputs.values() for dim in shape if isinstance(dim, str)}
    length = most_positions(model) or _MAX_LENGTH
    limits = {"B": MAX_BATCH, "I": MAX_BATCH, "S": length, "T": length}
    return {name: (1, limit) for name, limit in limits.items() if name in names}


def most_positions(model: Any) -> int:
    """How many tokens a model has positions for, or 0 where its config states no limit."""
    config = getattr(model, "config", None)
    if isinstance(model, PreTrainedModel):
        config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 0


def _image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Channels, height and width of the images that the model's config, or one within it, asks for."""
    for config in configs_of(model):
        channels, size = getattr(config, "num_channels", None), getattr(config, "image_size", None)
        if channels is not None and size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            return int(channels), int(height), int(width)
    raise CaptureError(
        f"{type(model).__name__}: its config does not say which images it takes (num_channels, image_size); pass "
        "example_inputs={'pixel_values': ...}"
    )


def vocabulary(model: Any) -> int:
    """How many token ids a model's embedding table has, or 0 for a model without one."""
    try:
        table = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:
        return 0
    return table.num_embeddings if isinstance(table, torch.nn.Embedding) else 0
