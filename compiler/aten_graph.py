"""One of AOT autograd's functional ATen graphs, read for lowering: its roots, sizes, layouts and device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from tilewright.ir.errors import LoweringError

from .capture import Captured, CapturedGraph
from .shown_outputs import computing, is_tensor, showing, walk


@dataclass(frozen=True)
class SizeSource:
    """Where a dim's size is found among the arguments: a number, or one dim of a tensor."""

    name: str
    argument: int
    dim: int | None

    def read(self, args: Sequence[Any]) -> int:
        """The size in a call with these arguments."""
        given = args[self.argument]
        return int(given if self.dim is None else given.shape[self.dim])


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
        outputs: Any = module.graph.output_node().args[0]
        found = walk(outputs, ())
        roots = [n for n in module.graph.nodes if n in found.roots]
        sizes, symbols, hints = _sizes(placeholders)
        tensors = {n.name: number for number, n in enumerate(placeholders) if is_tensor(n)}
        literals = {str(n.target): _literal(module, n) for n in module.graph.find_nodes(op="get_attr")}
        compute = fx.GraphModule(module, computing(module.graph, roots))
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
            finish=fx.GraphModule(module, showing(module.graph, placeholders, roots, outputs, {})),
            sizes=sizes,
            hints=hints,
            inputs=tensors,
            layouts=tuple(_layout(r.meta["val"]) for r in roots),
            device=_device(module),
        )


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
    """The order of a tensor's dims in memory; None for a contiguous one. The example decides: to ask about symbolic
    sizes would add guards."""
    sizes, strides = ([_hint(n) for n in numbers] for numbers in (value.shape, value.stride()))
    order = tuple(sorted(range(value.dim()), key=lambda n: (-strides[n], -sizes[n])))
    varying = [n for n in order if sizes[n] != 1]
    return None if varying == sorted(varying) else order


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
