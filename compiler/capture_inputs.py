"""What a Hugging Face model is fed: its kind, and its tensor inputs with dtypes and dims."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedModel

from tilewright.ir.errors import CaptureError

from .cache import cache_name
from .capture_multimodal import causal_flags, position_axes, text_decoder
from .capture_ops import configs_of
from .capture_patches import types_are_tokens
from .capture_rope import CALL_LENGTH, switch_length
from .capture_seq2seq import ENCODER_MASK, ENCODER_STATES, is_encoder_decoder, numbers_positions, state_width

Kind = Literal["decoder", "encoder", "module"]
Inputs: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[str | int, ...]]]
"""Inputs by name: dtype and dims. B counts texts, or images where there are no texts; I counts images beside texts, and
E the states of an encoder that a decoder attends to."""

MAX_BATCH = 4096
_MAX_LENGTH = 1 << 20  # where the config states no limit


def model_kind(model: PreTrainedModel) -> Kind:
    """A decoder keeps state between calls: it takes a cache, and its attention is causal or it is recurrent. The rest
    are encoders."""
    if cache_name(model.forward) is None:
        return "encoder"
    flags = causal_flags(model)
    # Without attention Transformers' mark of states that cannot go back tells; until 5.23 the cache's name did, too.
    # A decoder of texts within a larger model may leave it to the masks that it is told (PaliGemma).
    told = text_decoder(model) and model.can_generate()
    causal = any(flags) or told if flags else model._is_stateful or model.can_generate()
    return "decoder" if causal else "encoder"


def is_decoder_part(model: PreTrainedModel) -> bool:
    """True for the decoder out of an encoder-decoder; False for its encoder, whose config says the same."""
    return bool(model.config.is_encoder_decoder) and model_kind(model) == "decoder"


def has_known_inputs(model: PreTrainedModel) -> bool:
    """True for models of texts, images or sound: what is fed to them is known."""
    return model.main_input_name in ("input_ids", "pixel_values", "input_features")


def decoder_inputs(model: PreTrainedModel) -> Inputs:
    """The inputs that the decoder of an encoder-decoder is captured with; E counts states of the encoder."""
    inputs: dict[str, tuple[torch.dtype, tuple[str | int, ...]]] = {"input_ids": (torch.int64, ("B", "S"))}
    if numbers_positions(model):
        inputs["position_ids"] = (torch.int64, ("B", "S"))
    inputs["attention_mask"] = (torch.bool, ("B", "T"))
    inputs[ENCODER_STATES] = (model.dtype, ("B", "E", state_width(model)))
    inputs[ENCODER_MASK] = (torch.bool, ("B", "E"))
    return inputs


def model_inputs(model: PreTrainedModel, kind: Kind) -> Inputs:
    """The inputs that a model is captured with. Masks are boolean from the start: 2-D, over the whole context.

    Raises CaptureError for an encoder of images or sound whose config does not say how large they are.
    """
    if is_encoder_decoder(model):
        return decoder_inputs(model)
    known = inspect.signature(model.forward).parameters
    inputs: dict[str, tuple[torch.dtype, tuple[str | int, ...]]] = {}
    if "input_features" in known and not text_decoder(model):
        return {"input_features": (model.dtype, ("B", *_sound_shape(model)))}
    if "input_ids" in known:
        inputs["input_ids"] = (torch.int64, ("B", "S"))
    if kind == "decoder" and "position_ids" in known:
        axes = position_axes(model)
        inputs["position_ids"] = (torch.int64, ("B", "S") if axes == 1 else (axes, "B", "S"))
    if kind == "encoder" and "pixel_values" in known:
        inputs["pixel_values"] = (model.dtype, ("I" if inputs else "B", *_image_shape(model)))
    if "input_ids" in known:
        inputs["attention_mask"] = (torch.bool, ("B", "T" if kind == "decoder" else "S"))
    if kind == "decoder" and switch_length(model):
        inputs[CALL_LENGTH] = (torch.int64, (1,))
    if kind == "encoder" and "token_type_ids" in known and not types_are_tokens(model.config.model_type):
        inputs["token_type_ids"] = (torch.int64, ("B", "S"))
    return inputs


def symbol_ranges(model: PreTrainedModel, inputs: Inputs) -> dict[str, tuple[int, int]]:
    """Least and largest size of each symbol in the inputs' dims."""
    names = {dim for _, shape in inputs.values() for dim in shape if isinstance(dim, str)}
    length = most_positions(model) or _MAX_LENGTH
    limits = {"B": MAX_BATCH, "I": MAX_BATCH, "S": length, "T": length, "E": _MAX_LENGTH}
    return {name: (1, limit) for name, limit in limits.items() if name in names}


def most_positions(model: Any) -> int:
    """How many tokens a model has positions for, or 0 where its config states no limit."""
    config = getattr(model, "config", None)
    if isinstance(model, PreTrainedModel):
        config = model.config.get_text_config()
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    return next((limit for limit in limits if limit and limit > 0), 0)


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


def _sound_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Mel bins and frames of the spectrograms that a model takes; its convolutions make one state of some frames."""
    bins = getattr(model.config, "num_mel_bins", None)
    states = getattr(model.config, "max_source_positions", None)
    strides = [m.stride[0] for m in model.modules() if isinstance(m, torch.nn.Conv1d)]
    if bins is None or states is None:
        raise CaptureError(
            f"{type(model).__name__}: its config does not say how long a sound it takes (num_mel_bins, "
            "max_source_positions); pass example_inputs={'input_features': ...}"
        )
    return int(bins), int(states) * math.prod(strides)


def vocabulary(model: Any) -> int:
    """How many token ids a model's embedding table has, or 0 for a model without one."""
    try:
        table = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:
        return 0
    return table.num_embeddings if isinstance(table, torch.nn.Embedding) else 0
