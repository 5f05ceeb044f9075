"""The opaque op of a layer of experts, and its hook into transformers' ``ExpertsInterface``.

``tilewright::experts`` takes tokens x[N, K], chosen experts ids[N, k], their scores [N, k] and the stacked weights, and
gives [N, K]; it is never run. What a module does between its two products is read off by trial: its ``_apply_gate`` is
given random numbers, and the ``Gate`` that gives the same results, if there is one, becomes attributes of the op.
A module that does something else keeps the implementation that it had.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tilewright.ir.experts import ACTIVATIONS, Gate

from .capture_ops import IMPLEMENTATION, set_in_configs

_LIB = torch.library.Library("tilewright", "FRAGMENT")
_LIB.define(
    "experts(Tensor x, Tensor ids, Tensor scores, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    "Tensor? down_bias, str activation, float alpha, float limit, float offset, bool interleaved, "
    "bool transposed) -> Tensor"
)

EXPERTS = torch.ops.tilewright.experts.default


@torch.library.register_fake("tilewright::experts", lib=_LIB)
def _experts_shape(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _probe(inner: int) -> Tensor:
    """Gates and ups [64, 2 * inner] on both sides of any limit that models have."""
    return 6 * torch.randn(64, 2 * inner, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _gates(module: Any) -> Iterator[Gate]:
    """The gates that a module may have."""
    interleaved = not module.is_concatenated
    for activation in ACTIVATIONS:
        yield Gate(activation, interleaved=interleaved)
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if isinstance(alpha, int | float) and isinstance(limit, int | float):
        yield Gate("silu", float(alpha), float(limit), 1.0, interleaved)


def find_gate(module: nn.Module) -> Gate | None:
    """The gate of a module that is decorated with ``use_experts_implementation``, or None where it is none of ours."""
    experts: Any = module
    # What some releases have not heard of, their modules do not do.
    more = [getattr(experts, name, False) for name in ("has_post_expert_norm", "_is_expert_parallel")]
    if not experts.has_gate or any(more):
        return None
    inner = experts.down_proj.shape[1 if experts.is_transposed else 2]
    probe = _probe(inner)
    try:
        with torch.no_grad():
            found = experts._apply_gate(probe)
    except (RuntimeError, TypeError):  # it computes in a type of its own, or on a device
        return None
    return next((g for g in _gates(experts) if _same(g(probe), found)), None)


def _same(a: Tensor, b: Any) -> bool:
    return (
        isinstance(b, Tensor)
        and a.shape == b.shape
        and torch.allclose(a, b.to(a.dtype), rtol=1e-9, atol=1e-9)
    )


@contextmanager
def opaque_experts(model: nn.Module) -> Iterator[None]:
    """Route the model's experts through the opaque op while the block runs; always restores every config."""
    modules = [m for m in model.modules() if hasattr(m, "_apply_gate") and hasattr(m, "is_transposed")]
    gates = {m: gate for m in modules if (gate := find_gate(m)) is not None}
    if not gates:
        yield
        return
    with set_in_configs(model, "_experts_implementation_internal", IMPLEMENTATION) as own:
        ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = _forward(gates, own)
        try:
            yield
        finally:
            del ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]


def _forward(gates: Mapping[nn.Module, Gate], own: Mapping[int, str | None]) -> Any:
    """What transformers calls in place of a module's experts: (module, x[N, K], ids[N, k], scores[N, k]) -> [N, K]."""

    def forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
        gate = gates.get(module)
        if gate is None:
            eager = type(module).forward.__wrapped__
            implementation = ALL_EXPERTS_FUNCTIONS.get_interface(own[id(module.config)], eager)
            return implementation(module, *args, **kwargs)
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        return _opaque(module, gate, *given.args[1:])

    return forward


def _opaque(module: Any, gate: Gate, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    return EXPERTS(
        x, ids, scores, module.gate_up_proj, module.down_proj, *biases,
        gate.activation, gate.alpha, gate.limit, gate.offset, gate.interleaved, module.is_transposed,
    )  # fmt: skip
