"""Models that take images or sound beside texts: what they make of them are vectors among those of the prompt's tokens.

In Transformers such a model holds a decoder of texts, and hands it the prompt as vectors. What comes before that is the
model's own affair; the decoder is captured through the whole model, given texts alone, and its prompts are vectors.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .capture_ops import configs_of
from .front import decoder_call, front_of

DEEP_VECTORS, DEEP_PLACES = "deepstack_visual_embeds", "visual_pos_masks"
"""Names of the vectors of images for later layers, f[n, d] for each of these, and their tokens, bool[B, S]."""


def text_decoder(model: PreTrainedModel) -> str:
    """The path of the decoder to which a model of texts and more hands vectors; "" for a model that is one itself."""
    if model.config.is_encoder_decoder or model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    if decoder is None or decoder in (model, model.base_model):
        return ""
    return next((path for path, module in model.named_modules() if module is decoder), "")


def token_vectors(model: PreTrainedModel) -> str:
    """The path of the module that makes vectors of token ids, where prompts may be vectors; else ""."""
    if not text_decoder(model):
        return ""
    table = model.get_input_embeddings()
    return next((path for path, module in model.named_modules() if module is table), "")


def deep_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """The paths of the layers to whose results a prompt with images adds vectors, where a model has such.

    (Meng et al., "DeepStack: Deeply Stacking Visual Tokens is Surprisingly Simple and Effective for LMMs", 2024.)
    """
    path = text_decoder(model)
    if not path or DEEP_VECTORS not in inspect.signature(model.get_submodule(path).forward).parameters:
        return ()
    sources = (getattr(config, "deepstack_visual_indexes", ()) for config in configs_of(model))
    return tuple(f"{path}.layers.{n}" for n in range(max(map(len, sources))))


@torch.no_grad()
def makes_masks(model: PreTrainedModel) -> bool:
    """Whether a model tells its decoder which keys tokens see, and not only which of them are padding.

    That is seen in what it calls it with for a short text, padded, as there may be no mask where nothing is hidden.
    """
    path = text_decoder(model)
    if not path:
        return False
    ids, padded = (torch.tensor([row], device=model.device) for row in ([1, 1], [0, 1]))
    try:
        front = front_of(model, path, type(model), {})
        told = decoder_call(front, path, input_ids=ids, attention_mask=padded)
    except (TypeError, ValueError, RuntimeError):  # no text alone
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
