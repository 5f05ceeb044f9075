"""Models that take images or sound beside texts: what they make of them are vectors among those of the prompt's tokens.

In Transformers such a model holds a decoder of texts, and hands it the prompt as vectors. What comes before that is the
model's own affair; the decoder is captured through the whole model, given texts alone, and its prompts are vectors.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .capture_ops import configs_of
from .front import decoder_call, front_of

DEEP_VECTORS, DEEP_PLACES = "deepstack_visual_embeds", "visual_pos_masks"
"""Names of the vectors of images for later layers, f[n, d] for each of these, and their tokens, bool[B, S]."""


@dataclass(frozen=True)
class VectorPrompts:
    """What is to be known of prompts that are vectors.

    decoder, embedding: paths of the decoder of texts, and of the module that makes vectors of token ids. deep_layers:
    paths of the layers to whose results a prompt adds vectors. sees_ahead: tokens of a prompt may see later ones.
    """

    decoder: str
    embedding: str
    deep_layers: tuple[str, ...]
    sees_ahead: bool

    @staticmethod
    def of(model: PreTrainedModel) -> VectorPrompts | None:
        """Of a model of texts and more; None for one that is a decoder of texts itself, or has no such module."""
        decoder = text_decoder(model)
        if not decoder:
            return None
        table = model.get_input_embeddings()
        embedding = next((path for path, module in model.named_modules() if module is table), "")
        if not embedding:
            return None
        return VectorPrompts(decoder, embedding, _deep_layers(model, decoder), _makes_masks(model, decoder))


def causal_flags(module: nn.Module) -> list[bool]:
    """What each attention in a module takes no mask at all for: as causal, or as one that sees every key."""
    flags = (getattr(part, "is_causal", None) for part in module.modules())
    return [flag for flag in flags if isinstance(flag, bool)]


def text_decoder(model: PreTrainedModel) -> str:
    """The path of the decoder to which a model of texts and more hands vectors; "" for a model that is one itself."""
    if model.config.is_encoder_decoder or model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    if decoder is None or decoder in (model, model.base_model):
        return ""
    return next((path for path, module in model.named_modules() if module is decoder), "")


def _deep_layers(model: PreTrainedModel, path: str) -> tuple[str, ...]:
    """The paths of the layers to whose results a prompt with images adds vectors, where a model has such.

    (Meng et al., "DeepStack: Deeply Stacking Visual Tokens is Surprisingly Simple and Effective for LMMs", 2024.)
    """
    if DEEP_VECTORS not in inspect.signature(model.get_submodule(path).forward).parameters:
        return ()
    sources = (getattr(config, "deepstack_visual_indexes", ()) for config in configs_of(model))
    return tuple(f"{path}.layers.{n}" for n in range(max(map(len, sources))))


@torch.no_grad()
def _makes_masks(model: PreTrainedModel, path: str) -> bool:
    """Whether a model tells its decoder which keys tokens see, and not only which of them are padding.

    That is seen in what it calls it with for a short text, padded, as there may be no mask where nothing is hidden.
    """
    ids, padded = (torch.tensor([row], device=model.device) for row in ([1, 1], [0, 1]))
    try:
        front = front_of(model, path, type(model), {})
        told = decoder_call(front, path, input_ids=ids, attention_mask=padded)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # no text alone
        return False
    mask = (told or {}).get("attention_mask")
    return mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)


def position_axes(model: PreTrainedModel) -> int:
    """How many numbers the position of a token is: 3 where an image has rows, columns and a time, else mostly 1.

    (Wang et al., "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution", 2024.)
    """
    if not text_decoder(model):
        return 1
    ropes = (getattr(c, "rope_parameters", None) or {} for c in configs_of(model))
    return max((len(rope.get("mrope_section") or (0,)) for rope in ropes), default=1)
