"""Recurrent layers, told by the functions that they call.

A mixer in Transformers projects its tokens, convolves over the last of them, takes a state through them and projects
back. It leaves the middle to functions of its own modelling file, under the same names in all of them, so that kernels
can take their place. So does capture: while it runs, these names stand for the ops that own the state
(``ir/recurrent.py``), and the mixer's forward, run without a cache, is traced as it is.

What a mixer does between its tokens in any other way is not seen here; ``capture_states`` refuses it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from .capture_ops import CAUSAL_CONV1D, LINEAR_ATTENTION, NEW_TOKENS

_LEAST_NORM = 1e-6  # what their l2norm adds to the squared length of a key


def create_recurrent_attention_mask(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """The mask over the whole context, bool[B, T], where theirs is cut to the new tokens or left out."""
    return attention_mask


def apply_mask_to_padding_states(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """hidden_states[B, S, C], zero where a token is padding."""
    if attention_mask is None:
        return hidden_states
    new = NEW_TOKENS(attention_mask, hidden_states).unsqueeze(-1)
    return hidden_states * new.to(hidden_states.dtype)


def causal_conv1d_fn(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """hidden_states[B, C, S] over the last K tokens, by weight[C, K]."""
    found: Tensor = CAUSAL_CONV1D(hidden_states.transpose(1, 2), weight.t(), bias).transpose(1, 2)
    return found if activation is None else ACT2FN[activation](found)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """query, key [B, S, G, N], value[B, S, H, D], beta[B, S, H] and the decay g[B, S, H], or g[B, S, H, N], give
    [B, S, H, D]; the state that theirs returns is the op's own."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    q, k = (_of_length_1(x.to(dtype)) if use_qk_l2norm_in_kernel else x.to(dtype) for x in (query, key))
    decay = g if g.ndim == 4 else g.unsqueeze(-1)
    found: Tensor = LINEAR_ATTENTION(q * q.shape[-1] ** -0.5, k, value, decay, beta)
    return found.to(query.dtype), None


def _of_length_1(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _LEAST_NORM)


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_: Any,
) -> Tensor:
    """hidden_states[B, S, H, P], time steps dt[B, S, H], A, D and dt_bias [H], B, C [B, S, G, N] give [B, S, H, P].

    In the words of linear attention: C are queries, B keys, and what is taken in are the inputs by their time steps.
    """
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = functional.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    x = hidden_states.float()
    decay = (A.float() * dt).unsqueeze(-1)
    found: Tensor = LINEAR_ATTENTION(C.float(), B.float(), x * dt.unsqueeze(-1), decay, None)
    return found if D is None else found + D.unsqueeze(-1) * x


_STANDS_FOR: dict[str, Callable[..., Any]] = {
    "create_recurrent_attention_mask": create_recurrent_attention_mask,
    "apply_mask_to_padding_states": apply_mask_to_padding_states,
    "causal_conv1d_fn": causal_conv1d_fn,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": mamba2_chunk_scan,
}
"""By the name of the function that a modelling file calls."""


@contextmanager
def opaque_recurrences(model: nn.Module) -> Iterator[None]:
    """Have the modelling files of the model's modules call the ops while the block runs; always restores them."""
    files = {type(m).__module__: vars(sys.modules[type(m).__module__]) for m in model.modules()}
    saved = [(names, name, names[name]) for names in files.values() for name in _STANDS_FOR if name in names]
    try:
        for names, name, _ in saved:
            names[name] = _STANDS_FOR[name]
        yield
    finally:
        for names, name, own in saved:
            names[name] = own
