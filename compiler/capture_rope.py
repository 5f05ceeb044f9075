"""Rotary embeddings whose frequencies depend on how long a sequence is.

Transformers recomputes them in the forward and keeps them in the module. Captured, they are chosen without a trace:

- "longrope" has two tables, for sequences up to the length of the model's first training and for longer ones (Ding et
  al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", 2024). A call takes one of them for all of its
  tokens, by its largest position. A prompt is run in pieces, which have to agree, so the length of the whole call is an
  input, ``CALL_LENGTH``.
- "dynamic" stretches beyond the positions that the model has, and these bound ``max_length``: one table does.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CALL_LENGTH = "call_length"
"""Input i64[1]: positions that the prompt at hand reaches, or 0 where a step's own positions say so."""


@dataclass
class CallLength:
    """The input while a forward is traced."""

    value: Tensor | None = None


def switch_length(model: nn.Module) -> int:
    """The longest sequence that takes the first of two tables; 0 for a model that has one."""
    lengths = [_first_length(m, layer) for m, kind, layer in _rotaries(model) if kind == "longrope"]
    return min(lengths, default=0)


def chosen_by_length(model: nn.Module) -> list[Tensor]:
    """The tables of a model whose values a capture spells out."""
    return [_first_table(module, layer) for module, _, layer in _rotaries(model)]


@contextmanager
def pure_rotaries(model: nn.Module, length: CallLength) -> Iterator[None]:
    """While the block runs, rotary embeddings choose their frequencies by ``length`` and change no module."""
    changed = {module for module, _, _ in _rotaries(model)}
    try:
        for module in changed:
            module.__dict__["forward"] = _pure_forward(module, length)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _rotaries(model: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """Modules whose frequencies depend on the length: with the kind, and the kind of layer, "" where there is one."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {"": kinds}).items():
            if kind == "longrope" or (isinstance(kind, str) and "dynamic" in kind):
                yield module, kind, layer


def _first_length(module: Any, layer: str) -> int:
    parameters = module.config.rope_parameters
    return int((parameters[layer] if layer else parameters)["original_max_position_embeddings"])


def _pure_forward(module: Any, length: CallLength) -> Any:
    forward = inspect.unwrap(type(module).forward)
    kinds = {layer: kind for m, kind, layer in _rotaries(module) if m is module}
    tables = {layer: _tables(module, kind, layer) for layer, kind in kinds.items()}

    def pure(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        layer = layer_type or ""
        if layer not in tables:
            return forward(module, x, position_ids, layer_type)
        first, second = tables[layer]
        chosen = first
        if second is not None:
            reached = torch.max(position_ids) + 1
            if length.value is not None:
                reached = torch.maximum(reached, length.value[0])
            chosen = torch.where(reached > _first_length(module, layer), second, first)
        seen = copy.copy(module)
        name = f"{layer}_inv_freq" if layer else "inv_freq"
        seen._buffers = {k: v for k, v in module._buffers.items() if k != name}
        seen.__dict__[name] = chosen
        return forward(seen, x, position_ids, *((layer_type,) if layer_type else ()))

    return pure


def _first_table(module: Any, layer: str) -> Tensor:
    table: Tensor = getattr(module, f"{layer}_original_inv_freq" if layer else "original_inv_freq")
    return table


def _tables(module: Any, kind: str, layer: str) -> tuple[Tensor, Tensor | None]:
    """The frequencies f32[D / 2] for short sequences, and for long ones where they are others."""
    first = _first_table(module, layer).detach().clone()
    if kind != "longrope":
        return first, None
    beyond = _first_length(module, layer) + 1
    second, _ = ROPE_INIT_FUNCTIONS[kind](
        module.config, first.device, seq_len=beyond, layer_type=layer or None
    )
    return first, second.detach().clone()
