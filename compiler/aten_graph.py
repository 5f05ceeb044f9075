"""A functional ATen graph, as AOT autograd gives it, in two parts: what has to be computed, and what shows it.

    %y = add(%x, 1)                 compute: x -> y              (lowered, compiled)
    %v = select(%y, 0, 0)     =>    finish:  x, n, y -> select(y, 0, 0), select(x, 0, 1), 2 * n
    %w = select(%x, 0, 1)
    return %v, %w, 2 * %n

An output may be a view of an input or share memory with another output, and callers see that: they write into it. So
the *roots*, what views lead back to, are computed, and PyTorch makes the views of them, which costs no kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from tilewright.ir.errors import LoweringError

from .capture import Captured, CapturedGraph


@dataclass(frozen=True)
class SizeSource:
    """Where a dim's size is found among the arguments: a number, or one dim of a tensor."""

    name: str
    argument: int
    dim: int | None

    def read(self, args: Sequence[object]) -> int:
        """The size in a call with these arguments."""
        given = args[self.argument]
        return int(given.shape[self.dim]) if isinstance(given, Tensor) and self.dim is not None else int(given)  # type: ignore[call-overload]


@dataclass(frozen=True)
class AtenGraph:
    """A graph whose roots can be compiled.

    captured: what ``lower`` takes; its inputs are named like the placeholders, its outputs are the roots.
    finish(*arguments, *roots): the outputs of the whole graph. sizes: one source per dim of ``captured.symbols``.
    hints: the dims' sizes in the example. inputs: argument number of each tensor by name. layouts: of each root, the
    order of its dims in memory, outermost first, or None for contiguous. device: where all tensors are.
    """

    captured: Captured
    finish: fx.GraphModule
    sizes: tuple[SizeSource, ...]
    hints: Mapping[str, int]
    inputs: Mapping[str, int]
    layouts: tuple[tuple[int, ...] | None, ...]
    device: torch.device

    @staticmethod
    def of(module: fx.GraphModule) -> AtenGraph:
        """Split a functional graph. Raises LoweringError for one with tensors or sizes that the IR does not have."""
        placeholders = module.graph.find_nodes(op="placeholder")
        roots, shown = _roots(module.graph)
        sizes, symbols, hints = _sizes(placeholders)
        tensors = {n.name: number for number, n in enumerate(placeholders) if _is_tensor(n)}
        literals = {str(n.target): _literal(module, n) for n in module.graph.find_nodes(op="get_attr")}
        compute = fx.GraphModule(module, _compute(module.graph, roots))
        main = CapturedGraph(
            name="main",
            exported=compute,
            inputs=tuple((name, name) for name in tensors),
            tensors={n.name: str(n.target) for n in compute.graph.find_nodes(op="get_attr")},
            literals=literals,
            symbols=symbols,
        )
        captured = Captured(
            main=main,
            layers={},
            calls={},
            symbols={name: (1, hint) for name, hint in hints.items()},
            tensors=literals,
            kind="module",
            outputs=tuple(f"output{n}" for n in range(len(roots))),
            output_class=None,
            output_spec=None,
            output_constants={},
            position_rule="past",
            notes=(),
        )
        return AtenGraph(
            captured=captured,
            finish=fx.GraphModule(module, _finish(module.graph, roots, shown)),
            sizes=sizes,
            hints=hints,
            inputs=tensors,
            layouts=tuple(_layout(r.meta["val"]) for r in roots),
            device=_device(module),
        )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


# --- views --------------------------------------------------------------------------------------------------------


def _base(node: fx.Node) -> fx.Node | None:
    """The node that this one is a view, or a list of views, of; None where it holds memory of its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and _base(source) is not None else None
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target.is_view:
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _roots(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """The tensors that outputs lead back to and that have to be computed; and what leads to the outputs from there:
    views and numbers. Both in the graph's order."""
    roots, shown = set(), set()
    pending = list(graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if node.op == "call_function" and _is_tensor(node) and _base(node) is None:
            roots.add(node)
        elif node.op != "placeholder" and node not in shown:
            shown.add(node)
            pending += node.all_input_nodes
    return [n for n in graph.nodes if n in roots], [n for n in graph.nodes if n in shown]


def _compute(graph: fx.Graph, roots: Sequence[fx.Node]) -> fx.Graph:
    """The graph with the roots as its outputs."""
    compute, table = fx.Graph(), {}
    for node in graph.nodes:
        if node.op != "output":
            table[node] = compute.node_copy(node, table.__getitem__)
    compute.output(tuple(table[r] for r in roots))
    return compute


def _finish(graph: fx.Graph, roots: Sequence[fx.Node], shown: Sequence[fx.Node]) -> fx.Graph:
    """From the arguments and the roots to the outputs: views, and arithmetic on sizes."""
    finish, table = fx.Graph(), {}
    for node in graph.find_nodes(op="placeholder"):
        table[node] = finish.placeholder(node.name)
    for n, root in enumerate(roots):
        table[root] = finish.placeholder(f"root_{n}")
    for node in shown:
        table[node] = finish.node_copy(node, table.__getitem__)
    finish.output(fx.map_arg(graph.output_node().args[0], table.__getitem__))
    return finish


# --- sizes, layouts, devices --------------------------------------------------------------------------------------


def _sizes(
    placeholders: Sequence[fx.Node],
) -> tuple[tuple[SizeSource, ...], dict[sympy.Symbol, str], dict[str, int]]:
    """Each size symbol: where it is read, our name for it, and its example."""
    names: dict[sympy.Symbol, str] = {}
    sources: list[SizeSource] = []
    hints: dict[str, int] = {}
    for number, node in enumerate(placeholders):
        value = node.meta.get("val")
        sizes = enumerate(value.shape) if isinstance(value, Tensor) else ((None, value),)
        for dim, size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.expr not in names:
                if not size.node.has_hint():
                    raise LoweringError(f"the size {size} depends on data, so it cannot be compiled")
                name = names[size.node.expr] = f"D{len(names)}"
                sources.append(SizeSource(name, number, dim))
                hints[name] = max(1, size.node.hint)
    return tuple(sources), names, hints


def _layout(value: Tensor) -> tuple[int, ...] | None:
    """The order of a tensor's dims in memory; None for a contiguous one."""
    if value.is_contiguous():
        return None
    strides = [_hint(s) for s in value.stride()]
    return tuple(sorted(range(value.dim()), key=lambda n: -strides[n]))


def _hint(size: int | torch.SymInt) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _literal(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """A tensor that the code spells out."""
    value = getattr(module, str(node.target), None)
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        raise LoweringError(f"{node.target} is no tensor with values")
    node.meta.setdefault("val", value)
    return value


def _device(module: fx.GraphModule) -> torch.device:
    """Where the graph's tensors are; numbers that are tensors of rank 0 may be on the CPU."""
    found = set()
    for node in module.graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, tuple | list) else (values,):
            if isinstance(value, Tensor):
                if value.layout is not torch.strided:
                    raise LoweringError(f"{node.name} is {value.layout}, the IR has dense tensors only")
                if value.dim() or value.device.type != "cpu":
                    found.add(value.device)
    if len(found) > 1:
        raise LoweringError(f"its tensors are on {', '.join(sorted(map(str, found)))}")
    return next(iter(found), torch.device("cpu"))
