"""The opaque ops of a captured graph, and their hooks into transformers' attention registries.

``tilewright::attention`` takes the *new* q, k, v and stands for "append to this layer's KV state, then attend";
``tilewright::layer`` stands for one whole decoder layer in the outer graph. ``tilewright::causal_conv1d``,
``selective_scan`` and ``linear_attention`` stand for "go on from this layer's recurrent state, and leave the new one",
and ``tilewright::new_tokens`` for the part of a mask that belongs to the new tokens. None is ever run: they exist for
tracing, and lowering gives them their meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from tilewright.ir.errors import CaptureError

from .capture_distances import ALL, CAUSAL, Distances
from .capture_masks import bounds_of, distances_in, mask_forward

IMPLEMENTATION = "tilewright"

_LIB = torch.library.Library("tilewright", "DEF")
_LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, Tensor? slopes, "
    "Tensor? distances, Tensor? bias, float scale, float softcap, int window, int ahead, bool causal) -> Tensor"
)
_LIB.define("layer(Tensor x, Tensor[] rest, int index) -> Tensor")
_LIB.define("causal_conv1d(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIB.define("selective_scan(Tensor x, Tensor dt, Tensor decay, Tensor input, Tensor output) -> Tensor")
_LIB.define("linear_attention(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? beta) -> Tensor")
_LIB.define("new_tokens(Tensor mask, Tensor x) -> Tensor")

ATTENTION = torch.ops.tilewright.attention.default
LAYER = torch.ops.tilewright.layer.default
CAUSAL_CONV1D = torch.ops.tilewright.causal_conv1d.default
SELECTIVE_SCAN = torch.ops.tilewright.selective_scan.default
LINEAR_ATTENTION = torch.ops.tilewright.linear_attention.default
NEW_TOKENS = torch.ops.tilewright.new_tokens.default
STATEFUL = frozenset({ATTENTION, CAUSAL_CONV1D, SELECTIVE_SCAN, LINEAR_ATTENTION})
"""Ops that read and write what a request keeps between calls."""


@torch.library.register_fake("tilewright::attention", lib=_LIB)
def _attention_shape(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """q[B,H,S,D], k[B,Hkv,S,D], v[B,Hkv,S,Dv] -> [B,S,H,Dv], the layout that transformers expects back."""
    return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.register_fake("tilewright::layer", lib=_LIB)
def _layer_shape(x: Tensor, rest: list[Tensor], index: int) -> Tensor:
    """A layer maps the residual stream to one of the same shape and dtype."""
    return torch.empty_like(x)


@torch.library.register_fake("tilewright::causal_conv1d", lib=_LIB)
def _causal_conv1d_shape(x: Tensor, *_: object) -> Tensor:
    """x[B,S,C], weight[K,C], bias[C] -> [B,S,C]; see ``ir/recurrent.py``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("tilewright::selective_scan", lib=_LIB)
def _selective_scan_shape(x: Tensor, *_: object) -> Tensor:
    """x, dt[B,S,C], decay f32[N,C], input, output[B,S,N] -> [B,S,C]; see ``ir/recurrent.py``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("tilewright::linear_attention", lib=_LIB)
def _linear_attention_shape(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """q, k[B,S,G,N], v[B,S,H,D], decay[B,S,H,1 or N], beta[B,S,H] -> [B,S,H,D]; see ``ir/recurrent.py``."""
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.register_fake("tilewright::new_tokens", lib=_LIB)
def _new_tokens_shape(mask: Tensor, x: Tensor) -> Tensor:
    """mask[B,T], x[B,S,..] -> the last S columns of the mask, [B,S].

    A slice would have export ask whether T is S or more, which the sizes of the example alone decide.
    """
    return mask.new_empty(x.shape[:2])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    slopes: Tensor | None = None,
    position_bias: Tensor | Literal[False] | None = None,
    distances: Distances | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of eager or SDPA attention: emit one opaque op.

    query, key, value [B, H, S, D] give [B, S, H, D]. ``s_aux`` [H] are sinks, under the name that transformers has for
    them. Only ``capture_patches`` passes ``slopes`` f32[H], those of ALiBi, a ``position_bias`` f32[H, R], which is a
    table by distance (False: there is none; of another rank it is an array that broadcasts to [B, H, S, T]), and
    ``distances`` of the keys that a query sees; these are else what the mask says, or ``is_causal`` where nothing is
    noted on it and it is no such array itself. Raises CaptureError for what the op cannot express.
    """
    if extra.get("head_mask") is not None:
        raise CaptureError(
            f"unsupported attention: {type(module).__name__} passes 'head_mask', for which the attention op has no "
            "operand; run this model with Hugging Face instead"
        )
    by_distance = position_bias if isinstance(position_bias, Tensor) and position_bias.ndim == 2 else None
    bias = position_bias if isinstance(position_bias, Tensor) and by_distance is None else None
    if distances is None:
        distances = distances_in(attention_mask)
    if distances is None and attention_mask is not None and attention_mask.ndim > 2:
        distances = ALL  # the mask itself hides what is to be hidden
    if distances is None:  # then the module alone says
        causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
        distances = CAUSAL if causal else ALL
    bounds = bounds_of(distances)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = ATTENTION(
        query,
        key,
        value,
        attention_mask,
        s_aux,
        slopes,
        by_distance,
        bias,
        float(scale),
        float(softcap or 0.0),
        bounds["window"],
        bounds["ahead"],
        bounds["causal"],
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, mask_forward)


def configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """Every distinct config that a submodule reads, sub-configs included."""
    found: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        pending = [c for c in vars(module).values() if isinstance(c, PretrainedConfig)]
        while pending:
            config = pending.pop()
            if id(config) not in found:
                found[id(config)] = config
                pending += [c for c in vars(config).values() if isinstance(c, PretrainedConfig)]
    return list(found.values())


@contextmanager
def set_in_configs(model: nn.Module, attribute: str, value: Any) -> Iterator[Mapping[int, Any]]:
    """Set an attribute of all the model's configs that have it while the block runs; gives what each had, by
    ``id(config)``."""
    configs = [config for config in configs_of(model) if hasattr(config, attribute)]
    saved = [(config, getattr(config, attribute)) for config in configs]
    try:
        for config, _ in saved:
            setattr(config, attribute, value)
        yield {id(config): own for config, own in saved}
    finally:
        for config, own in saved:
            setattr(config, attribute, own)


@contextmanager
def opaque_attention(model: nn.Module) -> Iterator[None]:
    """Route the model's attention through the opaque op while the block runs; always restores every config.

    The internal attribute is set, not the public one: the public setter recurses into sub-configs and would lose
    what each of them had.
    """
    with set_in_configs(model, "_attn_implementation_internal", IMPLEMENTATION):
        yield
