"""Repeated layers: find them, stand in for them while the outer graph is traced, and tell which are alike.

A transformer calls the children of one ``nn.ModuleList`` one after the other. Each such call becomes one opaque
``tilewright::layer`` op in the outer graph, and each *distinct* layer is exported once on its own, so the cost of
capture does not grow with depth.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from .capture_distances import Distances
from .capture_masks import distances_in, note_distances
from .capture_ops import LAYER


class NotALayerError(Exception):
    """The children of one ModuleList cannot stand as opaque layers; capture goes on without that list."""

    def __init__(self, list_name: str, reason: str) -> None:
        super().__init__(f"{list_name}: {reason}")
        self.list_name = list_name


@dataclass(frozen=True)
class Layer:
    """One child of a ModuleList: its absolute name, that of its list, and the module."""

    name: str
    list_name: str
    module: nn.Module


@dataclass(frozen=True)
class LayerRecord:
    """How the outer graph called one layer.

    ``leaves`` are the flattened arguments with None in place of tensors; ``positions`` says where the tensors go;
    ``inputs`` are those (fake, symbolic) tensors, the residual stream first.
    """

    layer: Layer
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    positions: tuple[int, ...]
    inputs: tuple[Tensor, ...]

    @functools.cached_property
    def static_signature(self) -> tuple[Any, ...]:
        """Equal for two calls of alike layers with alike arguments, but for the sizes of tensor arguments."""
        kinds = tuple((x.ndim, x.dtype) for x in self.inputs)
        leaves = str(self.spec), freeze(self.leaves), self.positions
        return module_signature(self.layer.module), *leaves, kinds, self.distances

    @property
    def distances(self) -> tuple[Distances | None, ...]:
        """What is noted on each tensor argument that is a mask."""
        return tuple(distances_in(x) for x in self.inputs)

    def names(self) -> tuple[str, ...]:
        """A readable name for each tensor argument: that of the parameter of forward, and where in it."""
        leaves: list[Any] = [None] * len(self.leaves)
        for position in self.positions:
            leaves[position] = position
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        arguments = inspect.signature(self.layer.module.forward).bind(*args, **kwargs).arguments
        numbers = pytree.tree_leaves(list(arguments.values()))
        flat = {n: name for n, name in zip(numbers, flat_names(arguments), strict=True) if n is not None}
        return tuple(flat[position] for position in self.positions)

    def signature(self) -> tuple[Any, ...]:
        """Equal for two calls when one exported graph serves both, with other weights.

        Ask for it after the outer export has ended: only then are equal sizes known to be equal.
        """
        return self.static_signature, tuple(str(tuple(x.shape)) for x in self.inputs)


def flat_names(arguments: Mapping[str, Any]) -> list[str]:
    """A distinct identifier for each leaf of a call's arguments, in the order of ``tree_leaves`` of their values.

    It is the argument's own name, with keys and numbers of what it nests appended; a name that is taken already gets
    further underscores.
    """
    names: dict[str, None] = {}
    for argument, value in arguments.items():
        for path, _ in pytree.tree_flatten_with_path(value)[0]:
            name = re.sub(r"\W+", "_", argument + pytree.keystr(path)).rstrip("_")
            while name in names:
                name += "_"
            names[name] = None
    return list(names)


@dataclass
class Recording:
    """Calls met while the outer graph was traced, in order; the index is the opaque op's ``index`` operand."""

    calls: list[LayerRecord] = field(default_factory=list)
    structures: dict[tuple[Any, ...], tuple[pytree.TreeSpec, tuple[Any, ...]]] = field(default_factory=dict)


def find_layers(model: nn.Module, skip: Sequence[str] = ()) -> list[Layer]:
    """The children of every outermost non-empty ModuleList whose children all hold parameters."""
    found: list[Layer] = []
    roots: list[str] = []
    for name, module in model.named_modules():
        if (
            not isinstance(module, nn.ModuleList)
            or name in skip
            or any(name.startswith(f"{r}.") for r in roots)
        ):
            continue
        children = list(module)
        if not children or any(next(c.parameters(), None) is None for c in children):
            continue
        roots.append(name)
        found += [Layer(f"{name}.{n}", name, child) for n, child in enumerate(children)]
    return found


@contextmanager
def opaque_layers(layers: Sequence[Layer]) -> Iterator[Recording]:
    """While the block runs each layer's forward emits one opaque op; always restores the forwards.

    Only instance attributes are touched. A layer that already has a forward of its own (accelerate's hooks set one)
    gets exactly that one back.
    """
    recording = Recording()
    saved = [(layer.module, vars(layer.module).get("forward")) for layer in layers]
    try:
        for layer in layers:
            layer.module.__dict__["forward"] = _opaque_forward(layer, layer.module.forward, recording)
        yield recording
    finally:
        for module, own_forward in saved:
            vars(module).pop("forward", None)
            if own_forward is not None:
                module.__dict__["forward"] = own_forward


def _opaque_forward(layer: Layer, original: Callable[..., Any], recording: Recording) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        positions = tuple(n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        inputs = tuple(leaves[n] for n in positions)
        if not inputs or positions[0] != 0 or not inputs[0].is_floating_point() or inputs[0].ndim < 2:
            raise NotALayerError(layer.list_name, "the first argument is not a floating-point tensor")
        if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves):
            raise NotALayerError(layer.list_name, "a layer takes a symbolic size as an argument")
        kept = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        record = LayerRecord(layer, spec, kept, positions, inputs)
        key = record.static_signature
        if key not in recording.structures:
            recording.structures[key] = _result_structure(layer, original, args, kwargs, inputs[0])
        recording.calls.append(record)
        out = LAYER(inputs[0], list(inputs[1:]), len(recording.calls) - 1)
        out_spec, rest = recording.structures[key]
        return pytree.tree_unflatten([out, *rest], out_spec)

    return forward


def _result_structure(
    layer: Layer, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> tuple[pytree.TreeSpec, tuple[Any, ...]]:
    """Run the layer on fake tensors, unrecorded, to learn what it returns: a tensor, or a tuple around one.

    Sizes are the trace's examples, as numbers: symbols take several times as long.
    """
    with disable_proxy_modes_tracing():
        args, kwargs, x = pytree.tree_map_only(Tensor, _of_example_size, (args, kwargs, x))
        result = original(*args, **kwargs)
    leaves, spec = pytree.tree_flatten(result)
    if (
        not leaves
        or not isinstance(leaves[0], Tensor)
        or any(isinstance(leaf, Tensor) for leaf in leaves[1:])
    ):
        raise NotALayerError(layer.list_name, "a layer returns more or less than one tensor")
    if leaves[0].shape != x.shape or leaves[0].dtype != x.dtype:
        raise NotALayerError(layer.list_name, "a layer changes the shape or dtype of its first argument")
    return spec, tuple(leaves[1:])


class LayerForward(nn.Module):
    """A layer as a function of the tensors in its call alone: the module that is exported once per signature."""

    def __init__(self, record: LayerRecord) -> None:
        super().__init__()
        self.layer = record.layer.module
        self._spec, self._leaves, self._positions = record.spec, record.leaves, record.positions
        self._distances = record.distances

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        leaves = list(self._leaves)
        for position, tensor, distances in zip(self._positions, inputs, self._distances, strict=True):
            note_distances(tensor, distances)
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        # Hooks of the layer itself ran in the outer graph already, so call forward, not the module.
        return pytree.tree_leaves(self.layer.forward(*args, **kwargs))[0]


def _of_example_size(tensor: Tensor) -> Tensor:
    sizes = [size if isinstance(size, int) else size.node.hint for size in tensor.shape]
    return tensor if None in sizes else tensor.new_empty(sizes)


# --- which layers are alike ---------------------------------------------------------------------------------------

BARE_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
_LAYER_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number"})


def module_signature(layer: nn.Module) -> tuple[Any, ...]:
    """Module classes, attributes (but layer numbers), and shapes and dtypes of tensors, of a layer and all below it."""
    parts = []
    for name, module in layer.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in BARE_MODULE and k not in _LAYER_NUMBERS}
        own.pop("forward", None)
        attributes = tuple((k, freeze(own[k])) for k in sorted(own))
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = tuple((k, tuple(t.shape), t.dtype, t.device) for k, t in tensors)
        hooks = tuple(freeze(h) for h in (module._forward_hooks, module._forward_pre_hooks) if h)
        parts.append((name, type(module), module.training, attributes, shapes, hooks))
    return tuple(parts)


def freeze(value: Any) -> Any:
    """A hashable stand-in, equal for values that trace alike.

    Tensors count by shape and dtype (their values are captured by name, not baked in). Objects of unknown kind count
    by identity: that may keep two equal layers apart, which costs time, but never merges different ones.
    """
    if value is None or isinstance(
        value, int | float | str | bytes | torch.dtype | torch.device | types.FunctionType
    ):
        return type(value), value
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype
    if isinstance(value, list | tuple):
        return type(value), tuple(freeze(v) for v in value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(freeze(v) for v in value)
    if isinstance(value, dict):
        return type(value), tuple((freeze(k), freeze(v)) for k, v in value.items())
    if isinstance(value, functools.partial):
        return "partial", freeze(value.func), freeze(value.args), freeze(value.keywords)
    return type(value), id(value)
