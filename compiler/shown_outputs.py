"""A functional graph in two parts: what has to be computed, and what of it is shown to callers.

    %y = add(%x, 1)                 roots: y                     (lowered, compiled)
    %v = select(%y, 0, 0)     =>    shown: x, n, y -> select(y, 0, 0), select(x, 0, 1), 2 * n
    %w = select(%x, 0, 1)
    return %v, %w, 2 * %n

An output may be a view of an input or share memory with another output, and callers see that: they write into it. So
the *roots*, what views lead back to, are computed, and PyTorch makes the views of them, which costs no kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from .capture import Captured
from .writes import is_write


@dataclass(frozen=True)
class ShownOutputs:
    """What a module's callers see of the computed roots.

    ``arguments`` names what ``writes`` and ``outputs`` take, before the roots: inputs, parameters and buffers by their
    logical names. ``writes(*arguments, *roots)`` gives the new values of those in ``written``; once these are copied,
    ``outputs(*arguments, *roots)`` gives what the module returns.
    """

    arguments: tuple[str, ...]
    written: tuple[str, ...]
    writes: fx.GraphModule
    outputs: fx.GraphModule

    def show(self, tensors: Mapping[str, Tensor], roots: Sequence[Tensor]) -> tuple[Any, ...]:
        """Update inputs and buffers in place, and give the outputs; ``tensors`` are those named in ``arguments``."""
        given = [tensors[name] for name in self.arguments]
        for name, value in zip(self.written, self.writes(*given, *roots), strict=True):
            tensors[name].copy_(value)
        return tuple(self.outputs(*given, *roots))


def split_outputs(captured: Captured) -> tuple[Captured, ShownOutputs]:
    """A captured module with the roots as its outputs; buffers that it updates become inputs of their own."""
    main = captured.main
    assert isinstance(main.exported, ExportedProgram)
    writes = any(is_write(node) for node in main.exported.graph.nodes)
    exported = main.exported.run_decompositions({}) if writes else main.exported
    graph, signature = exported.graph, exported.graph_signature
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    logical = {**main.tensors, **dict(main.inputs)}
    buffers = {target: name for name, target in signature.inputs_to_buffers.items()}
    returned: Any = graph.output_node().args[0]
    values = list(returned)
    updates: dict[fx.Node, fx.Node] = {}
    shown: list[Any] = []
    for spec, value in zip(signature.output_specs, values, strict=True):
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            target = str(spec.target)
            updates[value] = placeholders[buffers.get(target, target)]
        else:
            shown.append(value)
    roots = _ordered(graph, walk(updates, ()).roots | walk(shown, updates).roots)
    arguments = [n for n in placeholders.values() if n.name in logical]
    updated = [n.name for n in updates.values() if n.name in main.tensors]
    compute = fx.GraphModule(exported.graph_module, computing(graph, roots))
    split = replace(
        main,
        exported=compute,
        inputs=(*main.inputs, *((name, main.tensors[name]) for name in updated)),
        tensors={name: target for name, target in main.tensors.items() if name not in updated},
    )
    outputs = ShownOutputs(
        arguments=tuple(logical[n.name] for n in arguments),
        written=tuple(logical[n.name] for n in updates.values()),
        writes=fx.GraphModule(exported.graph_module, showing(graph, arguments, roots, tuple(updates), {})),
        outputs=fx.GraphModule(
            exported.graph_module, showing(graph, arguments, roots, tuple(shown), updates)
        ),
    )
    return replace(captured, main=split, outputs=tuple(f"output{n}" for n in range(len(roots)))), outputs


def is_tensor(node: fx.Node) -> bool:
    """True for a node that gives one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def base_of(node: fx.Node) -> fx.Node | None:
    """The node that this one is a view, or a list of views, of; None where it holds memory of its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and base_of(source) is not None else None
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target.is_view:
        return None
    base = node.args[0]
    if not isinstance(base, fx.Node) or (
        is_tensor(node) and node.meta["val"].dtype != base.meta["val"].dtype
    ):
        return None
    return base


@dataclass(frozen=True)
class Walk:
    """``roots``: tensors that have to be computed; ``shown``: the views and numbers on the way from there."""

    roots: set[fx.Node]
    shown: set[fx.Node]


def walk(outputs: Any, given: Any) -> Walk:
    """Back from ``outputs`` to what has to be computed; nodes in ``given`` are there already."""
    found, pending = Walk(set(), set()), nodes_in(outputs)
    while pending:
        node = pending.pop()
        if node.op == "placeholder" or node in given:
            continue
        if node.op == "call_function" and is_tensor(node) and base_of(node) is None:
            found.roots.add(node)
        elif node not in found.shown:
            found.shown.add(node)
            pending += node.all_input_nodes
    return found


def nodes_in(values: Any) -> list[fx.Node]:
    """The nodes in a nest of arguments."""
    found: list[fx.Node] = []
    fx.map_arg(tuple(values), found.append)
    return found


def _ordered(graph: fx.Graph, nodes: set[fx.Node]) -> list[fx.Node]:
    return [n for n in graph.nodes if n in nodes]


def computing(graph: fx.Graph, roots: Sequence[fx.Node]) -> fx.Graph:
    """The graph with the roots as its outputs."""
    result = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "output":
            table[node] = result.node_copy(node, table.__getitem__)
    result.output(tuple(table[r] for r in roots))
    return result


def showing(
    graph: fx.Graph,
    arguments: Sequence[fx.Node],
    roots: Sequence[fx.Node],
    outputs: Any,
    given: Mapping[fx.Node, fx.Node],
) -> fx.Graph:
    """From arguments and roots to ``outputs``: views, and arithmetic on sizes. A node of ``given`` stands for the
    argument that it is mapped to."""
    result = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    for node in arguments:
        table[node] = result.placeholder(node.name)
    for n, root in enumerate(roots):
        table[root] = result.placeholder(f"root_{n}")
    table.update({node: table[argument] for node, argument in given.items()})
    for node in _ordered(graph, walk(outputs, given).shown):
        table[node] = result.node_copy(node, table.__getitem__)
    result.output(fx.map_arg(tuple(outputs), table.__getitem__))
    return result
