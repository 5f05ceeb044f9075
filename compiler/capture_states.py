"""Whatever a model keeps between calls has to be one of our states: what is kept in any other way is refused.

A model is captured without a cache, so a module that would keep something in one, but by no op of ours, looks like one
that keeps nothing. Its first call would be right, and all that go on from it wrong.
"""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn

from tilewright.ir.errors import CaptureError

from .cache import cache_name
from .capture_ops import ATTENTION, CAUSAL_CONV1D, LAYER, LINEAR_ATTENTION, SELECTIVE_SCAN, STATEFUL

_KEPT_BY = {
    "update": frozenset({ATTENTION}),
    "update_conv_state": frozenset({CAUSAL_CONV1D}),
    "update_recurrent_state": frozenset({SELECTIVE_SCAN, LINEAR_ATTENTION}),
}
"""Methods of Transformers' caches by which a module keeps something, and the ops that stand for it."""

# Of modules that keep something in other words. A layer has a graph of its own, in which its modules are looked at.
_OWNERS = STATEFUL | {LAYER}
_NAMES = ("layer_past", "past_key_value")
"""What some modules call the cache that the model hands down to them."""


def require_known_states(model: nn.Module, graphs: Iterable[fx.Graph]) -> None:
    """Raise CaptureError for a module of a decoder that was traced, uses a cache, and has left no op that owns it."""
    keepers = _keepers(model)
    for graph in graphs:
        for (path, kind), targets in _targets(graph, keepers).items():
            updates = [name for name in keepers[kind] if name.startswith("update")]
            needed = [_KEPT_BY.get(name, frozenset()) for name in updates] or [_OWNERS]
            if not all(ops & targets for ops in needed):
                raise CaptureError(
                    f"unsupported state: {kind.rpartition('.')[2]} ({path}) of {type(model).__name__} keeps something "
                    "between calls that is neither the keys and values of attention nor that of a recurrent layer of a "
                    "known kind; run this model with Hugging Face instead"
                )


def _keepers(model: nn.Module) -> Mapping[str, frozenset[str]]:
    """By full name of a class: what its forward uses of the cache that it is given. Those whose modules hold others
    that use one are left out: they ask for its length, and hand it on."""
    used = {kind: _used_of_cache(kind) for kind in {type(m) for m in model.modules()}}
    users = [m for m in model.modules() if used[type(m)]]
    outer = {m for m in users for child in m.modules() if child is not m and used[type(child)]}
    return {_full_name(type(m)): used[type(m)] for m in users if m not in outer}


def _used_of_cache(kind: Any) -> frozenset[str]:
    """The attributes that the forward of a module class reads of its argument for a cache."""
    known = inspect.signature(kind.forward).parameters
    name = cache_name(kind.forward) or next((n for n in _NAMES if n in known), None)
    steps = list(dis.get_instructions(inspect.unwrap(kind.forward)))
    return frozenset(
        str(after.argval)
        for step, after in itertools.pairwise(steps)
        if name is not None and step.opname.startswith("LOAD_FAST") and _last_loaded(step) == name
        if after.opname in ("LOAD_ATTR", "LOAD_METHOD")
    )


def _last_loaded(step: dis.Instruction) -> Any:
    """The local variable on top of the stack; from Python 3.13 on one instruction may load two."""
    return step.argval[-1] if isinstance(step.argval, tuple) else step.argval


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _targets(graph: fx.Graph, keepers: Mapping[str, frozenset[str]]) -> dict[tuple[str, str], set[Any]]:
    """By path and class of each module among ``keepers`` that was traced: what its nodes call."""
    found: dict[tuple[str, str], set[Any]] = {}
    for node in graph.nodes:
        for path, kind in node.meta.get("nn_module_stack", {}).values():
            name = kind if isinstance(kind, str) else _full_name(kind)
            if name in keepers:
                found.setdefault((path, name), set()).add(node.target)
    return found
