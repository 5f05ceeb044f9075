"""The decoder of an encoder-decoder is captured through the whole model, which is given the encoder's states.

So the graph holds the decoder and the head, and its inputs are those of a decoder alone together with two that stay
the same for a whole request: the states of the encoder and their mask. What depends on nothing else, the keys and
values of cross-attention, is told apart in the IR (``passes.hoist_per_request``), where it needs no help of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from tilewright.ir.errors import CaptureError

from .cache import with_cache

ENCODER_STATES = "encoder_hidden_states"
ENCODER_MASK = "encoder_attention_mask"
PER_REQUEST = (ENCODER_STATES, ENCODER_MASK)
"""Inputs f[B, E, d] and bool[B, E] of a decoder that do not change while a request is decoded."""


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """True for a whole encoder-decoder that can generate text, or has the two parts of one that can."""
    return bool(model.config.is_encoder_decoder) and "decoder_input_ids" in _parameters(model)


def numbers_positions(model: PreTrainedModel) -> bool:
    """True where the decoder takes the positions of its tokens as an input."""
    return "decoder_position_ids" in _parameters(model)


def whole_model_arguments(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the whole model's forward that have it run its decoder alone, on ``inputs`` by the names that a
    decoder's have, encoder states and mask among them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    arguments: dict[str, Any] = {
        "encoder_outputs": BaseModelOutput(last_hidden_state=inputs[ENCODER_STATES]),
        "attention_mask": inputs[ENCODER_MASK],
        "decoder_input_ids": ids,
        "decoder_attention_mask": mask,
        **with_cache(model.forward, _KnownLength(mask.shape[1] - ids.shape[1])),
    }
    if "position_ids" in inputs:
        arguments["decoder_position_ids"] = inputs["position_ids"]
    return {name: value for name, value in arguments.items() if name in _parameters(model)}


def state_width(model: PreTrainedModel) -> int:
    """Size of one encoder state. Raises CaptureError where the encoder's config does not say."""
    config = model.get_encoder().config
    width = getattr(config, "d_model", None) or getattr(config, "hidden_size", None)
    if not width:
        raise CaptureError(f"{type(model).__name__}: its encoder's config states no d_model or hidden_size")
    return int(width)


def _parameters(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


class _PassThrough(Cache):
    """A cache that holds nothing, and says that ``length`` positions came before: new keys and values are all there
    are, since the attention op takes those alone."""

    def __init__(self, length: int | torch.SymInt) -> None:
        super().__init__(layers=[])
        self.length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        return query_length + self.length, 0


class _Forgetful(dict[int, bool]):
    """Which layers hold the keys and values of cross-attention already: none, however often they run."""

    def __setitem__(self, key: int, value: bool) -> None:
        pass


class _KnownLength(EncoderDecoderCache):
    """What a decoder takes for its cache while it is traced: it counts positions on from a length that is a size."""

    def __init__(self, length: int | torch.SymInt) -> None:
        super().__init__(_PassThrough(length), _PassThrough(length))
        self.is_updated = _Forgetful()

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.self_attention_cache.get_query_offset(layer_idx)
