"""Capture: an ``nn.Module`` becomes FX graphs at training IR, with symbolic batch and sequence sizes.

A Hugging Face transformer becomes an outer graph, in which each repeated layer is one opaque ``tilewright::layer`` op,
and one graph per *distinct* layer. Attention is one opaque ``tilewright::attention`` op over the new q, k, v, so there
is no cache, no mask array and no mutation in any graph, and one graph serves prefill and decode. Any other module goes
through plain ``torch.export``. Weights are referred to by name and never copied; the model is left as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tilewright.ir.errors import CaptureError

from .capture_experts import opaque_experts
from .capture_export import export, symbol_names
from .capture_inputs import (
    MAX_BATCH,
    Inputs,
    Kind,
    has_known_inputs,
    is_decoder_part,
    model_inputs,
    model_kind,
    symbol_ranges,
)
from .capture_layers import LayerForward, LayerRecord, NotALayerError, find_layers, flat_names, opaque_layers
from .capture_multimodal import VectorPrompts, text_decoder
from .capture_ops import STATEFUL, attention_forward, opaque_attention, set_in_configs
from .capture_patches import PositionRule, has_own_attention, position_rule, rerouted
from .capture_ready import check_ready
from .capture_recurrent import opaque_recurrences
from .capture_rope import CALL_LENGTH, CallLength, pure_rotaries
from .capture_seq2seq import ENCODER_STATES, PER_REQUEST, is_encoder_decoder, whole_model_arguments
from .capture_states import require_known_states

# Example sizes: at least 2, because export specialises on 0 and 1, and all different, so that none passes for another.
_EXAMPLE = {"B": 2, "S": 3, "T": 5, "I": 7, "E": 11}


@dataclass(frozen=True)
class CapturedGraph:
    """One exported graph, or one of AOT autograd, which is functional already.

    ``inputs`` pairs each input placeholder with its logical name; ``tensors`` maps each parameter, buffer or constant
    to a tensor name, relative to the layer for layer graphs and absolute for the outer graph;
    ``literals`` holds those tensors that the code itself spells out; ``symbols`` maps the size symbols of the export to
    our names.
    """

    name: str
    exported: ExportedProgram | fx.GraphModule
    inputs: tuple[tuple[str, str], ...]
    tensors: Mapping[str, str]
    literals: Mapping[str, Tensor]
    symbols: Mapping[sympy.Symbol, str]


@dataclass(frozen=True)
class LayerCall:
    """Which layer graph an opaque layer op stands for, and the module path that its tensor names hang beneath."""

    callee: str
    scope: str


@dataclass(frozen=True, kw_only=True)
class CapturedFacts:
    """What is known of a captured model besides its graphs. ``tensors`` holds the model's own tensors (shared, not
    copied) by absolute name.

    ``outputs`` names what the outer graph returns, in order. They fill the pytree ``output_spec``, for a "module"
    together with ``output_constants``, the leaves (by position) that are no tensors. For a Hugging Face model that tree
    is a ModelOutput, of the class ``output_class``. ``per_request`` names inputs that stay the same while a request is
    decoded. ``vectors`` is known where prompts may be vectors. ``notes`` says, for the report, which repeated layers
    could not be captured as layers and why, and what is left to PyTorch.
    """

    tensors: Mapping[str, Tensor]
    kind: Kind
    outputs: tuple[str, ...]
    output_class: type | None
    output_spec: pytree.TreeSpec | None
    output_constants: Mapping[int, Any]
    position_rule: PositionRule
    notes: tuple[str, ...]
    per_request: tuple[str, ...] = ()
    vectors: VectorPrompts | None = None


@dataclass(frozen=True, kw_only=True)
class Captured(CapturedFacts):
    """A captured model: its graphs too, and the ranges of their ``symbols``."""

    main: CapturedGraph
    layers: Mapping[str, CapturedGraph]
    calls: Mapping[int, LayerCall]
    symbols: Mapping[str, tuple[int, int]]


def capture(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any] | None = None) -> Captured:
    """Capture ``model``; ``example_inputs`` (args or kwargs) is required for anything but a Hugging Face
    model of text or images.

    Raises CaptureError, naming the module and the remedy, when the model is in training mode, has no weights (meta
    tensors), or does something that export or the attention op cannot express.
    """
    check_ready(model)
    if example_inputs is not None:
        return _capture_module(model, example_inputs)
    if not isinstance(model, PreTrainedModel) or not has_known_inputs(model):
        raise CaptureError(
            f"{type(model).__name__} is not a Hugging Face model of text, images or sound, so its inputs are unknown; "
            "pass example_inputs= (a tuple of arguments or a dict of keyword arguments)"
        )
    if not is_encoder_decoder(model) and is_decoder_part(model):
        raise CaptureError(
            f"{type(model).__name__} is the decoder out of an encoder-decoder, which attends to the encoder's states; "
            "compile the whole model"
        )
    return _capture_transformer(model)


# --- Hugging Face models ------------------------------------------------------------------------------------------


@dataclass
class _Returned:
    """What a traced forward returned. A holder of its own, because export undoes attributes set on a module."""

    names: tuple[str, ...] = ()
    output_class: type | None = None
    spec: pytree.TreeSpec | None = None
    constants: dict[int, Any] = field(default_factory=dict)


def _tensors_of(out: ModelOutput) -> ModelOutput:
    """A result with its tensors alone, those of results within it included."""
    kept = {k: _tensors_of(v) if isinstance(v, ModelOutput) else v for k, v in out.items()}
    return type(out)(**{k: v for k, v in kept.items() if isinstance(v, Tensor | ModelOutput)})


class _Outer(nn.Module):
    """The model as a function of one dict of tensors, giving the tensors of its ModelOutput; notes their names."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.returned = _Returned()
        self.length = CallLength()

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        self.length.value = inputs.get(CALL_LENGTH)
        inputs = {name: value for name, value in inputs.items() if name != CALL_LENGTH}
        whole = is_encoder_decoder(self.model)
        arguments = whole_model_arguments(self.model, inputs) if whole else inputs
        out = self.model(**arguments, return_dict=True, **self._switched_off())
        tensors = _tensors_of(out)
        if whole:  # the states that it was given are no result
            tensors = type(tensors)(**{k: v for k, v in tensors.items() if v is not inputs[ENCODER_STATES]})
        leaves, self.returned.spec = pytree.tree_flatten(tensors)
        self.returned.output_class, self.returned.names = type(out), tuple(flat_names(tensors))
        return tuple(leaves)

    def _switched_off(self) -> dict[str, bool]:
        known = inspect.signature(self.model.forward).parameters
        return {"use_cache": False} if "use_cache" in known else {}


def _capture_transformer(model: PreTrainedModel) -> Captured:
    kind = model_kind(model)
    inputs = model_inputs(model, kind)
    ranges = symbol_ranges(model, inputs)
    outer = _Outer(model)
    part: Any = model.get_submodule(text_decoder(model))  # towers beside it may do otherwise
    dispatches = has_own_attention(model) or part._can_set_attn_implementation()
    if kind == "decoder" and not dispatches:
        raise _unsupported_attention(model)
    try:
        main, layers, calls, notes = _trace(model, outer, inputs, ranges, is_opaque=dispatches)
    except CaptureError as error:
        if kind == "decoder" or not dispatches or has_own_attention(model):
            raise
        # An encoder keeps no state, so its attention may be captured as the ordinary ops it is.
        try:
            main, layers, calls, notes = _trace(model, outer, inputs, ranges, is_opaque=False)
        except CaptureError:
            raise error from None
        notes.append(f"attention is captured as ordinary ops: {str(error).splitlines()[0]}")
    graphs = [main, *layers.values()]
    if kind == "decoder" and not any(n.target in STATEFUL for g in graphs for n in g.exported.graph.nodes):
        raise _unsupported_attention(model)
    if kind == "decoder":
        require_known_states(model, [g.exported.graph for g in graphs])
    vectors = VectorPrompts.of(model) if kind == "decoder" else None
    if vectors is not None:
        notes.append(f"what comes before {vectors.decoder} in prompts with more than texts is run by PyTorch")
    return Captured(
        main=main,
        layers=layers,
        calls=calls,
        symbols=ranges,
        tensors=_all_tensors(model, main, layers, calls),
        kind=kind,
        outputs=outer.returned.names,
        output_class=outer.returned.output_class,
        output_spec=outer.returned.spec,
        output_constants={},
        position_rule=position_rule(model.config.model_type),
        notes=tuple(notes),
        per_request=PER_REQUEST if is_encoder_decoder(model) else (),
        vectors=vectors,
    )


def _trace(
    model: PreTrainedModel,
    outer: _Outer,
    inputs: Inputs,
    ranges: Mapping[str, tuple[int, int]],
    is_opaque: bool,
) -> tuple[CapturedGraph, dict[str, CapturedGraph], dict[int, LayerCall], list[str]]:
    """The outer graph, the distinct layers, the calls, and notes on lists of modules that are no layers."""
    notes: list[str] = []
    skip: list[str] = []
    replaced: list[AbstractContextManager[Any]] = [
        torch.no_grad(),
        *([opaque_attention(model)] if is_opaque else []),
        opaque_experts(model),
        opaque_recurrences(model),
        rerouted(model, attention_forward),
        pure_rotaries(model, outer.length),
        # Some ask their config alone whether to keep a cache; with one no two layers are alike.
        set_in_configs(model, "use_cache", False),
    ]
    with ExitStack() as stack:
        for context in replaced:
            stack.enter_context(context)
        while True:
            try:
                return *_capture_layered(model, outer, inputs, ranges, skip), notes
            except NotALayerError as error:
                skip.append(error.list_name)
                notes.append(f"layers of {error} (captured as part of the whole model)")


def _capture_layered(
    model: PreTrainedModel,
    outer: _Outer,
    inputs: Inputs,
    ranges: Mapping[str, tuple[int, int]],
    skip: list[str],
) -> tuple[CapturedGraph, dict[str, CapturedGraph], dict[int, LayerCall]]:
    """The outer graph, the distinct layers, and the calls. Raises NotALayerError for a list that has to be skipped."""
    dims = {name: Dim(name, min=lo, max=hi) for name, (lo, hi) in ranges.items()}
    examples = {
        name: torch.ones(_example_sizes(shape), dtype=dtype, device=model.device)
        for name, (dtype, shape) in inputs.items()
    }
    shapes = {name: _symbolic(shape, dims) for name, (_, shape) in inputs.items()}
    with opaque_layers(find_layers(model, skip)) as recording:
        exported = export(outer, (examples,), {"inputs": shapes}, type(model).__name__)
    symbols = symbol_names(exported, [shape for _, shape in inputs.values()])
    main = _untied(_graph("main", exported, tuple(inputs), symbols, prefix="model."), model)
    layers: dict[str, CapturedGraph] = {}
    by_signature: dict[Any, str] = {}
    calls: dict[int, LayerCall] = {}
    for index, record in enumerate(recording.calls):
        signature = record.signature()
        callee = by_signature.get(signature)
        if callee is None:
            callee = by_signature[signature] = f"layer{len(layers)}"
            layers[callee] = _capture_layer(callee, record, symbols, dims)
        calls[index] = LayerCall(callee, record.layer.name)
    return main, layers, calls


def _capture_layer(
    name: str, record: LayerRecord, symbols: Mapping[sympy.Symbol, str], dims: Mapping[str, Dim]
) -> CapturedGraph:
    """Export one distinct layer. Its example inputs have the sizes that the outer graph's symbols stand for."""
    named = [tuple(_dim_name(size, symbols, record) for size in x.shape) for x in record.inputs]
    examples = tuple(
        torch.zeros(_example_sizes(shape), dtype=x.dtype, device=x.device)
        for x, shape in zip(record.inputs, named, strict=True)
    )
    shapes = tuple(_symbolic(shape, dims) for shape in named)
    try:
        exported = export(LayerForward(record), (examples,), {"inputs": shapes}, record.layer.name)
    except CaptureError as error:
        raise NotALayerError(record.layer.list_name, str(error).splitlines()[0]) from error
    return _graph(name, exported, record.names(), symbol_names(exported, named), prefix="layer.")


def _example_sizes(shape: Sequence[str | int]) -> list[int]:
    return [_EXAMPLE[d] if isinstance(d, str) else d for d in shape]


def _symbolic(shape: Sequence[str | int], dims: Mapping[str, Dim]) -> dict[int, Dim]:
    """The dims of an input that export keeps symbolic, by position."""
    return {n: dims[d] for n, d in enumerate(shape) if isinstance(d, str)}


def _dim_name(size: Any, symbols: Mapping[sympy.Symbol, str], record: LayerRecord) -> str | int:
    if isinstance(size, int):
        return size
    name = symbols.get(size.node.expr)
    if name is None:
        raise NotALayerError(
            record.layer.list_name, f"an argument has a size ({size}) that is no plain symbol"
        )
    return name


def _unsupported_attention(model: nn.Module) -> CaptureError:
    return CaptureError(
        f"unsupported attention: {type(model).__name__} neither dispatches through transformers.AttentionInterface nor "
        "has recurrent layers of a known kind, so the state that it keeps cannot be told apart; run this model with "
        "Hugging Face instead"
    )


def _all_tensors(
    model: nn.Module, main: CapturedGraph, layers: Mapping[str, CapturedGraph], calls: Mapping[int, LayerCall]
) -> dict[str, Tensor]:
    """Every tensor that a graph refers to, by absolute name; literals of a layer graph are shared by its calls."""
    own = own_tensors(model)
    needed = {name: main.literals.get(name) for name in main.tensors.values()}
    for call in calls.values():
        graph = layers[call.callee]
        for name in graph.tensors.values():
            needed[f"{call.scope}.{name}"] = graph.literals.get(name)
    found: dict[str, Tensor] = {}
    for name, literal in needed.items():
        tensor = own.get(name, literal)
        if tensor is None:
            raise CaptureError(
                f"{type(model).__name__}: the graph refers to {name!r}, which the model does not have"
            )
        found[name] = tensor
    return found


def _untied(graph: CapturedGraph, model: nn.Module) -> CapturedGraph:
    """The graph with each tied weight under one name, the first that the model gives it."""
    first: dict[int, str] = {}
    own = own_tensors(model)
    for name, tensor in own.items():
        first.setdefault(id(tensor), name)
    tensors = {p: first[id(own[name])] if name in own else name for p, name in graph.tensors.items()}
    return replace(graph, tensors=tensors)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers (non-persistent too) and plain tensor attributes, under every name that they have."""
    own: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        held = [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]
        own.update({f"{path}.{k}" if path else k: v for k, v in held if isinstance(v, Tensor)})
    return own


# --- any other module ---------------------------------------------------------------------------------------------


_VARYING = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


class _Plain(nn.Module):
    """A module as a function of (args, kwargs) that gives its flat outputs, tensors and sizes; notes how they nest."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.returned = _Returned()

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        leaves, self.returned.spec = pytree.tree_flatten(self.model(*args, **kwargs))
        self.returned.constants = {n: leaf for n, leaf in enumerate(leaves) if not isinstance(leaf, _VARYING)}
        return tuple(leaf for leaf in leaves if isinstance(leaf, _VARYING))


def _capture_module(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any]) -> Captured:
    args = example_inputs if isinstance(example_inputs, tuple) else ()
    kwargs = example_inputs if isinstance(example_inputs, dict) else {}
    leaves = pytree.tree_leaves((args, kwargs))
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise CaptureError(
            f"{type(model).__name__}: example_inputs must hold tensors only (tuples, lists and dicts may nest)"
        )
    if any(leaf.is_meta for leaf in leaves):
        raise CaptureError(f"{type(model).__name__}: example_inputs must be real tensors, not meta tensors")
    plain = _Plain(model)
    exported, ranges, notes = _export_dynamic_batch(plain, args, kwargs, leaves)
    names = _input_names(model, args, kwargs)
    dims: list[tuple[str, ...]] = [("B",)] * len(leaves) if ranges else []
    main = _untied(_graph("main", exported, names, symbol_names(exported, dims), prefix="model."), model)
    spec = plain.returned.spec
    assert spec is not None
    return Captured(
        main=main,
        layers={},
        calls={},
        symbols=ranges,
        tensors=_all_tensors(model, main, {}, {}),
        kind="module",
        outputs=tuple(f"output{n}" for n in range(spec.num_leaves - len(plain.returned.constants))),
        output_class=None,
        output_spec=spec,
        output_constants=plain.returned.constants,
        position_rule="past",
        notes=notes,
    )


def _input_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """The name of each tensor in the order of export, which flattens keyword arguments as they were given."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    args, kwargs = pytree.tree_unflatten(list(range(len(leaves))), spec)
    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    numbers = pytree.tree_leaves(list(arguments.values()))
    names: dict[int, str] = dict(zip(numbers, flat_names(arguments), strict=True))
    return tuple(names[n] for n in range(len(leaves)))


def _export_dynamic_batch(
    plain: _Plain, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Tensor]
) -> tuple[ExportedProgram, dict[str, tuple[int, int]], tuple[str, ...]]:
    """Export with dim 0 of every input as ``B`` where the module allows it, else with the examples' own sizes."""
    name = type(plain.model).__name__
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    note = "the inputs do not share a first dim"
    with torch.no_grad():
        if len(sizes) == 1 and (size := next(iter(sizes))) is not None and size > 0:
            rows = size

            def grow(x: Tensor) -> Tensor:
                return torch.cat([x, x, x]) if rows < 3 else x.clone()  # export specialises on size 1

            grown = pytree.tree_map(grow, (args, kwargs))
            for least in (1, 3):  # from 3 rows on, all but one of them are several
                batch = Dim("B", min=least, max=MAX_BATCH)
                shapes = pytree.tree_map(lambda _, dim=batch: {0: dim}, (args, kwargs))
                try:
                    exported = export(plain, grown, {"args": shapes[0], "kwargs": shapes[1]}, name)
                    return exported, {"B": (least, MAX_BATCH)}, ()
                except CaptureError as error:
                    note = str(error).splitlines()[0]
        return export(plain, (args, kwargs), None, name), {}, (f"sizes are fixed to the example's: {note}",)


_TENSOR_KINDS = frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR})


def _graph(
    name: str,
    exported: ExportedProgram,
    logical: Sequence[str],
    symbols: Mapping[sympy.Symbol, str],
    prefix: str,
) -> CapturedGraph:
    """Pair user inputs with their logical names, and tensors with theirs less the wrapper's ``prefix``."""
    inputs = tuple(zip((str(n) for n in exported.graph_signature.user_inputs), logical, strict=True))
    used = {node.name for node in exported.graph.find_nodes(op="placeholder") if node.users}
    tensors = {
        spec.arg.name: str(spec.target).removeprefix(prefix)
        for spec in exported.graph_signature.input_specs
        if spec.kind in _TENSOR_KINDS and spec.arg.name in used
    }
    literals = {n.removeprefix(prefix): t for n, t in exported.constants.items() if "lifted_tensor" in n}
    return CapturedGraph(name, exported, inputs, tensors, literals, symbols)
