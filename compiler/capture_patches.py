"""What capture has to know about single architectures. Nothing else in the compiler may name one.

Keyed by ``config.model_type``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from tilewright.ir.errors import CaptureError

from .capture_distances import CAUSAL, Distances
from .capture_ops import CAUSAL_CONV1D, NEW_TOKENS, SELECTIVE_SCAN

PositionRule = Literal["past", "mask"]

# How a decoder numbers its tokens when the caller gives no position_ids. Most count on from the length of
# the past ("past"); these count the ones of the attention mask, so that left padding shifts nothing ("mask").
_POSITIONS_FROM_MASK = frozenset({"opt"})


def position_rule(model_type: str) -> PositionRule:
    """The rule by which a decoder's plain forward makes up position_ids that were not given."""
    return "mask" if model_type in _POSITIONS_FROM_MASK else "past"


# An encoder that is told no token types takes zeros. These look types up in their table of tokens, so that no types
# add nothing, and zeros would add the first token.
_TYPES_ARE_TOKENS = frozenset({"xlm", "flaubert", "codegen", "openai-gpt", "imagegpt"})


def types_are_tokens(model_type: str) -> bool:
    """True for a model to which token types of zero are not the same as none."""
    return model_type in _TYPES_ARE_TOKENS


Attend = Callable[..., tuple[Tensor, None]]
"""The hook of ``AttentionInterface``: (module, query, key, value [B, H, S, D], mask, scaling=, is_causal=, slopes=) ->
[B, S, H, D], None."""


@dataclass(frozen=True)
class _Override:
    """An attribute that a module has while capture runs, or the file of the model's class."""

    module: nn.Module | ModuleType
    name: str
    value: Any


def has_own_attention(model: PreTrainedModel) -> bool:
    """True for a model that has to be rerouted before its attention can be told apart."""
    return model.config.model_type in _REROUTES


@contextmanager
def rerouted(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Have the model's attention modules call ``attend`` while the block runs.

    Raises CaptureError for a model whose attention no call of ``attend`` can say.
    """
    reroute = _REROUTES.get(model.config.model_type)
    overrides = [*(reroute(model, attend) if reroute else ()), *_all_queries(model)]
    saved = [vars(o.module).get(o.name, _ABSENT) for o in overrides]
    for o in overrides:
        o.module.__dict__[o.name] = o.value
    try:
        yield
    finally:
        for o, value in zip(overrides, saved, strict=True):
            if value is _ABSENT:
                del o.module.__dict__[o.name]
            else:
                o.module.__dict__[o.name] = value


_ABSENT = object()


def _all_queries(model: PreTrainedModel) -> Iterator[_Override]:
    """Models that drop the queries of most tokens before their last layers, which keep no keys and values of their own,
    and cut the mask over queries and keys for that. How many logits are kept is decided later, in the IR."""

    def same(x: Tensor, inputs: Any, positions: Any, masks: Any, *_: object, **__: object) -> tuple[Any, ...]:
        return x, inputs, positions, masks

    for module in model.modules():
        if hasattr(module, "_maybe_slice_kv_shared_inputs"):
            yield _Override(module, "_maybe_slice_kv_shared_inputs", same)


# --- attention in a method ----------------------------------------------------------------------------------------


def _reroute_attn(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    """Modules whose method ``_attn`` multiplies scores and values over what the cache gave them.

    It takes query, key, value [B, H, S, D] and the mask, and gives the result in that layout, and weights; scores are
    divided by ``scale_attn``.
    """

    for module in model.modules():
        if hasattr(module, "_attn") and hasattr(module, "scale_attn"):
            scale = 1.0 / float(module.scale_attn)
            yield _Override(module, "_attn", partial(_attended, attend, module, scale, None))


def _attended(
    attend: Attend,
    module: nn.Module,
    scale: float,
    distances: Distances | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any = None,
) -> tuple[Tensor, None]:
    query, key = query.to(value.dtype), key.to(value.dtype)
    result, _ = attend(module, query, key, value, mask, scaling=scale, is_causal=True, distances=distances)
    return result.transpose(1, 2), None


def _reroute_gpt_neo(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    """The same without a scale; causality, with a window in local layers, is a buffer of each module."""
    window = Distances(1 - model.config.window_size, 0)
    for module in model.modules():
        if hasattr(module, "_attn"):
            seen = window if module.attention_type == "local" else CAUSAL
            yield _Override(module, "_attn", partial(_attended, attend, module, 1.0, seen))


# --- bias by distance ---------------------------------------------------------------------------------------------


def _by_distance(attention: Any, most: int, bucket: Callable[[Tensor], Tensor]) -> Tensor:
    """The biases f32[H, R] of all distances up to ``most`` on either side, by the buckets that they are in."""
    embedding = attention.relative_attention_bias
    buckets = bucket(torch.arange(-most, most + 1, device=embedding.weight.device))
    return cast(Tensor, embedding(buckets).t().float())


def _reroute_relative(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    """Stacks of blocks, of which the first sorts distances into buckets, each with a bias per head; the others are
    given what it computed.

    In place of an array over queries and keys each block is given a table f32[H, R] by distance: from ``max_distance``
    on all distances are in one bucket. The table is computed once, outside of the blocks, so that they are alike.
    """

    def table(attention: Any) -> Tensor:
        most = attention.relative_attention_max_distance
        bucket = partial(
            attention._relative_position_bucket,
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=most,
        )
        return _by_distance(attention, most, bucket)

    def given(attention: Any) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # False: cross-attention would make an array of zeros for want of a bias.
            return (*args[:2], table(attention), *args[3:5], False, *args[6:]), kwargs

        return hook

    def route(block: Any) -> Callable[..., tuple[Tensor, None, None]]:
        forward = type(block).forward

        def one_result(*args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
            return forward(block, *args, **kwargs)[0], None, None

        return one_result

    for stack in model.modules():
        if isinstance(blocks := getattr(stack, "block", None), nn.ModuleList):
            first = next(m for m in blocks[0].modules() if getattr(m, "has_relative_attention_bias", False))
            hook = given(first)
            for block in blocks:
                yield _Override(block, "_forward_pre_hooks", {0: hook})
                yield _Override(block, "_forward_pre_hooks_with_kwargs", {0: True})
                yield _Override(block, "forward", route(block))


def _reroute_relative_each(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    """Attention modules each of which has a bias by distance of its own, and computes it in its forward."""

    def route(attention: Any) -> Callable[..., Any]:
        forward, bucket = type(attention).forward, attention._relative_position_bucket
        most = getattr(attention, "relative_attention_max_distance", 0)

        def bias(*_: object, **__: object) -> Tensor:
            return _by_distance(attention, most, bucket)

        def routed(*args: Any, **kwargs: Any) -> Any:
            own = attention.has_relative_attention_bias
            # Without a bias, as in cross-attention, it would make an array of zeros.
            given = {
                "has_relative_attention_bias": True,
                "compute_bias": bias if own else lambda *_, **__: False,
            }
            attention.__dict__.update(given)
            try:
                return forward(attention, *args, **kwargs)
            finally:
                attention.__dict__["has_relative_attention_bias"] = own
                del attention.__dict__["compute_bias"]

        return routed

    for module in model.modules():
        if hasattr(module, "compute_bias") and hasattr(module, "_relative_position_bucket"):
            yield _Override(module, "forward", route(module))


def _reroute_mpnet(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    """An encoder that computes one array of biases for all its layers, whose attention is spelled out."""
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder, MPNetSelfAttention

    def table(encoder: Any) -> Callable[..., Tensor]:
        bucket = encoder.relative_position_bucket
        most = inspect.signature(bucket).parameters["max_distance"].default

        def bias(*_: object, **__: object) -> Tensor:
            return _by_distance(encoder, most, bucket)

        return bias

    def route(attention: Any) -> Callable[..., tuple[Tensor]]:
        def forward(
            x: Tensor, attention_mask: Tensor, position_bias: Tensor, **rest: object
        ) -> tuple[Tensor]:
            projections = (attention.q, attention.k, attention.v)
            query, key, value = _heads(x, attention.attention_head_size, projections)
            result, _ = attend(
                attention, query, key, value, attention_mask, is_causal=False, position_bias=position_bias
            )
            return (attention.o(result.flatten(2)),)

        return forward

    for module in model.modules():
        if isinstance(module, MPNetEncoder):
            yield _Override(module, "compute_position_bias", table(module))
        if isinstance(module, MPNetSelfAttention):
            yield _Override(module, "forward", route(module))


def _heads(x: Tensor, size: int, projections: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Projections of x [B, S, K] as heads [B, H, S, size]."""
    return tuple(project(x).unflatten(2, (-1, size)).transpose(1, 2) for project in projections)


# --- rotary embeddings as complex numbers -------------------------------------------------------------------------


def _reroute_complex_rotary(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    """Models that turn neighbours in a head by multiplying complex numbers, which the IR has none of: cosines and sines
    take their place, in a last dim of two."""

    def angles(rotary: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(x: Tensor, position_ids: Tensor) -> Tensor:
            turned = position_ids.unsqueeze(-1).float() * rotary.inv_freq.float()
            return torch.stack((turned.cos(), turned.sin()), dim=-1) * rotary.attention_scaling

        return forward

    def apply_rotary_emb(query: Tensor, key: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = turned.unsqueeze(1).unbind(-1)

        def rotated(x: Tensor) -> Tensor:
            real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
            both = (real * cosine - imaginary * sine, real * sine + imaginary * cosine)
            return torch.stack(both, dim=-1).flatten(3).type_as(x)

        return rotated(query), rotated(key)

    yield _Override(sys.modules[type(model).__module__], "apply_rotary_emb", apply_rotary_emb)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            yield _Override(module, "forward", angles(module))


# --- attention in a forward ---------------------------------------------------------------------------------------
#
# These modules project, attend and project back in one forward, and ALiBi reaches some as a tensor over all keys. That
# forward is written here anew around ``attend``, which is given the slopes instead; the tensor is not built. A row's
# softmax cancels what all its keys share, so it makes no difference where a model starts to count positions. (That
# BLOOM does not count masked keys makes one, but only where masked keys lie between others.)


def _slopes(alibi: Tensor) -> Tensor:
    """The slopes f32[H] in a bias f32[H, 1, 2] over two neighbouring keys, as the model itself computes it."""
    return alibi[:, 0, 1] - alibi[:, 0, 0]


def _nothing(*_: object, **__: object) -> None:
    """In place of what computes a value that a rerouted attention does not use."""


def _reroute_bloom(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    from transformers.models.bloom.modeling_bloom import BloomAttention, BloomModel, build_alibi_tensor

    def route(attention: Any) -> Callable[..., tuple[Tensor, None]]:
        def forward(
            x: Tensor, residual: Tensor, attention_mask: Tensor, **rest: object
        ) -> tuple[Tensor, None]:
            query, key, value = attention._reshape(attention.query_key_value(x))
            result, _ = attend(
                attention, query, key, value, attention_mask,
                scaling=attention.inv_norm_factor, is_causal=True, slopes=slopes,
            )  # fmt: skip
            return residual + attention.dense(result.flatten(2)), None

        return forward

    two_keys = torch.ones(1, 2, dtype=torch.int64, device=model.device)
    slopes = _slopes(build_alibi_tensor(two_keys, model.config.num_attention_heads, torch.float32))
    for module in model.modules():
        if isinstance(module, BloomModel):
            yield _Override(module, "build_alibi_tensor", _nothing)
        if isinstance(module, BloomAttention):
            yield _Override(module, "forward", route(module))


def _reroute_mpt(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    from transformers.models.mpt.modeling_mpt import MptAttention, MptModel, build_mpt_alibi_tensor

    def route(attention: Any) -> Callable[..., tuple[Tensor, None]]:
        def forward(x: Tensor, attention_mask: Tensor, **rest: object) -> tuple[Tensor, None]:
            projected = attention.Wqkv(x)
            if attention.clip_qkv:
                projected = projected.clamp(min=-attention.clip_qkv, max=attention.clip_qkv)
            heads = projected.unflatten(2, (3, attention.n_heads, attention.head_dim))
            query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
            result, _ = attend(
                attention, query, key, value, attention_mask,
                scaling=attention.softmax_scale, is_causal=True, slopes=slopes,
            )  # fmt: skip
            return attention.out_proj(result.flatten(2)), None

        return forward

    # The model passes no alibi_bias_max on, nor does it ask its config whether to use ALiBi at all.
    slopes = _slopes(build_mpt_alibi_tensor(model.config.num_attention_heads, 2, device=model.device))
    for module in model.modules():
        if isinstance(module, MptModel):
            yield _Override(module, "build_mpt_alibi_tensor", _nothing)
        if isinstance(module, MptAttention):
            yield _Override(module, "forward", route(module))


def _reroute_xglm(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    from transformers.models.xglm.modeling_xglm import XGLMAttention

    def route(attention: Any) -> Callable[..., tuple[Tensor, None]]:
        def forward(hidden_states: Tensor, attention_mask: Tensor, **rest: object) -> tuple[Tensor, None]:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            query, key, value = _heads(hidden_states, attention.head_dim, projections)
            result, _ = attend(
                attention, query, key, value, attention_mask, scaling=attention.scaling, is_causal=True
            )
            return attention.out_proj(result.flatten(2)), None

        return forward

    for module in model.modules():
        if isinstance(module, XGLMAttention):
            yield _Override(module, "forward", route(module))


def _reroute_falcon(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

    if model.config.alibi:
        # Keys that lie together share one rounded bias, so that it depends on their places and not only on distances.
        # With the exact bias one token in eight comes out otherwise (700 tokens, 32 heads, random weights).
        raise CaptureError(
            f"unsupported attention: {type(model).__name__} rounds its ALiBi bias to bfloat16 in every dtype, so that "
            "it is no multiple of the distance; run this model with Hugging Face instead"
        )

    def route(attention: Any) -> Callable[..., tuple[Tensor, None]]:
        def forward(
            x: Tensor, attention_mask: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: object
        ) -> tuple[Tensor, None]:
            # In each variant the heads of a group lie together: its queries, its key, its value. A group keeps one key
            # and value, which the model itself may repeat.
            sizes = (attention.num_kv_heads, -1, attention.head_dim)
            groups = attention.query_key_value(x).unflatten(2, sizes)
            query = groups[..., :-2, :].flatten(2, 3).transpose(1, 2)
            key, value = (groups[..., n, :].transpose(1, 2) for n in (-2, -1))
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            result, _ = attend(
                attention, query, key, value, attention_mask,
                scaling=attention.inv_norm_factor, is_causal=True,
            )  # fmt: skip
            return attention.dense(result.flatten(2)), None

        return forward

    for module in model.modules():
        if isinstance(module, FalconAttention):
            yield _Override(module, "forward", route(module))


# --- recurrent layers ---------------------------------------------------------------------------------------------
#
# A mixer's forward branches by what its cache holds, and loops over the tokens. It is written here anew around the two
# ops that own the recurrent state, with channels last, as the products before and after have them.


def _reroute_mamba(model: PreTrainedModel, attend: Attend) -> Iterator[_Override]:
    def route(mixer: Any) -> Callable[..., Tensor]:
        def same(x: Tensor) -> Tensor:
            return x

        # Some have norms of the time step, and of what goes into the state and comes out of it.
        names = ("dt_layernorm", "b_layernorm", "c_layernorm")
        norms = [getattr(mixer, name, same) for name in names]
        sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]

        def forward(hidden_states: Tensor, attention_mask: Tensor, **rest: object) -> Tensor:
            new = NEW_TOKENS(attention_mask, hidden_states).unsqueeze(-1)
            x, gate = mixer.in_proj(hidden_states * new.to(hidden_states.dtype)).chunk(2, dim=-1)
            x = CAUSAL_CONV1D(x, mixer.conv1d.weight.squeeze(1).t(), mixer.conv1d.bias)
            x = mixer.act(x).masked_fill(~new, 0)
            parts = mixer.x_proj(x).split(sizes, dim=-1)
            time, into, out_of = (norm(part) for norm, part in zip(norms, parts, strict=True))
            decay = -torch.exp(mixer.A_log.float()).t()
            y = SELECTIVE_SCAN(x, functional.softplus(mixer.dt_proj(time)), decay, into, out_of)
            y = (y + x * mixer.D) * functional.silu(gate)
            return cast(Tensor, mixer.out_proj(y))

        return forward

    for module in model.modules():
        if hasattr(module, "A_log") and hasattr(module, "x_proj"):
            yield _Override(module, "forward", route(module))
    yield from _wide_residuals(model)


def _wide_residuals(model: PreTrainedModel, _: Attend | None = None) -> Iterator[_Override]:
    """Models of half precision whose layers give float32: the first one takes the embeddings in it too, which changes
    no number, and so is like the others."""

    def widened(embeddings: Any) -> Callable[[Tensor], Tensor]:
        own = embeddings.forward

        def forward(ids: Tensor) -> Tensor:
            return cast(Tensor, own(ids).float())

        return forward

    if getattr(model.config, "residual_in_fp32", False) and model.dtype.itemsize < 4:
        embeddings = model.get_input_embeddings()
        yield _Override(embeddings, "forward", widened(embeddings))


_REROUTES: dict[str, Callable[[PreTrainedModel, Attend], Iterator[_Override]]] = {
    "gptj": _reroute_attn,
    "gpt_neo": _reroute_gpt_neo,
    "xglm": _reroute_xglm,
    "codegen": _reroute_attn,
    "bloom": _reroute_bloom,
    "mpt": _reroute_mpt,
    "falcon": _reroute_falcon,
    "t5": _reroute_relative,
    "mt5": _reroute_relative,
    "umt5": _reroute_relative_each,
    "mpnet": _reroute_mpnet,
    "deepseek_v2": _reroute_complex_rotary,
    "mamba": _reroute_mamba,
    "falcon_mamba": _reroute_mamba,
    "jamba": _reroute_mamba,
    "mamba2": _wide_residuals,
}
