"""What capture has to know about single architectures. Nothing else in the compiler may name one.

Keyed by ``config.model_type``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

PositionRule = Literal["past", "mask"]

# How a decoder numbers its tokens when the caller gives no position_ids. Most count on from the length of
# the past ("past"); these count the ones of the attention mask, so that left padding shifts nothing ("mask").
_POSITIONS_FROM_MASK = frozenset({"opt", "xglm"})


def position_rule(model_type: str) -> PositionRule:
    """The rule by which a decoder's plain forward makes up position_ids that were not given."""
    return "mask" if model_type in _POSITIONS_FROM_MASK else "past"


# Decoders whose attention modules multiply scores and values in a method of their own, over what the cache gave them,
# instead of asking transformers.AttentionInterface: the method, and the attribute that scores are divided by. It takes
# query, key, value, [B, H, S, D], and the mask, and gives the result in that layout, and weights.
_OWN_METHODS = {"gptj": ("_attn", "scale_attn"), "codegen": ("_attn", "scale_attn")}

Attend = Callable[..., tuple[Tensor, None]]
"""The hook of ``AttentionInterface``: (module, query, key, value, mask, scaling=, is_causal=) -> [B, S, H, D], None."""


def has_own_attention(model: PreTrainedModel) -> bool:
    """True for a model that has to be rerouted before its attention can be told apart."""
    return model.config.model_type in _OWN_METHODS


@contextmanager
def rerouted(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Have the model's attention modules call ``attend`` while the block runs."""
    method, divisor = _OWN_METHODS.get(model.config.model_type, ("", ""))
    modules = [m for m in model.modules() if method and hasattr(m, method) and hasattr(m, divisor)]

    def route(module: nn.Module) -> Callable[..., tuple[Tensor, None]]:
        def attended(query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> tuple[Tensor, None]:
            result, _ = attend(
                module, query.to(value.dtype), key.to(value.dtype), value, mask,
                scaling=1.0 / float(getattr(module, divisor)), is_causal=True,
            )  # fmt: skip
            return result.transpose(1, 2), None

        return attended

    for module in modules:
        object.__setattr__(module, method, route(module))
    try:
        yield
    finally:
        for module in modules:
            object.__delattr__(module, method)
