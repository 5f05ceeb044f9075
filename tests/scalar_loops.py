"""A brute-force interpreter of the loop form: every store, at every point, reductions as loops. Slow on purpose.

It shares nothing with the printers or with the reference evaluator of tensor ops: an element is computed from elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tilewright.ir.loops import Apply, Axis, Const, Dot, Index, Load, Loops, Node, Reduce, Segment
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.types import DType, Value

Points = Mapping[str, Any]
"""Symbol name -> its value at each point (int or an int64 tensor [points])."""


def evaluate_expr(expr: Any, env: Points) -> Any:
    """The value of an index expression; Python's floor semantics for division and modulo."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return env[expr.name]
    args = [evaluate_expr(a, env) for a in expr.args]
    match expr.func.__name__:
        case "Add":
            return sum(args)
        case "Mul":
            total = 1
            for a in args:
                total = total * a
            return total
        case "Pow":
            return args[0] ** args[1]
        case "FloorDiv":
            return args[0] // args[1]
        case "Mod":
            return args[0] % args[1]
        case "Max":
            return max(args)
        case "Min":
            return min(args)
    raise AssertionError(f"unexpected expression {expr!r}")


_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add, "prod": torch.mul, "max": torch.maximum, "min": torch.minimum,
    "any": torch.logical_or, "all": torch.logical_and,
}  # fmt: skip


def _wide(dtype: DType) -> torch.dtype:
    return torch.float64 if dtype.is_float else dtype.torch


class Interpreter:
    """Evaluates nodes at a batch of points. ``buffers`` holds the kernel's inputs; floats are float64 throughout."""

    def __init__(self, buffers: Mapping[Value, Tensor], dims: Mapping[str, int]) -> None:
        self.buffers = buffers
        self.dims = dims

    def node(self, node: Node, env: Points, count: int) -> Tensor:
        """The node's value at each of ``count`` points."""
        return self._node(node, env, count, {})

    def _node(self, node: Node, env: Points, count: int, memo: dict[Node, Tensor]) -> Tensor:
        if node not in memo:
            value = self._compute(node, env, count, memo)
            memo[node] = torch.as_tensor(value).to(_wide(node.dtype)).expand(count)
        return memo[node]

    def _compute(self, node: Node, env: Points, count: int, memo: dict[Node, Tensor]) -> Any:
        match node:
            case Const(value=value):
                return torch.tensor(value, dtype=_wide(node.dtype))
            case Index(expr=expr):
                return torch.as_tensor(evaluate_expr(expr, env))
            case Apply(op=op, args=args):
                return POINTWISE[op].torch(*(self._node(a, env, count, memo) for a in args))
            case Load():
                return self._load(node, env, count, memo)
            case Reduce(kind=kind, axes=axes, body=body):
                return self._fold(_COMBINE[kind], axes, env, lambda e: self._node(body, e, count, {}))
            case Dot(a=a, b=b, axis=axis):
                return self._fold(
                    torch.add,
                    (axis,),
                    env,
                    lambda e: self._node(a, e, count, {}) * self._node(b, e, count, {}),
                )
        raise AssertionError(f"unexpected node {node!r}")

    def _load(self, node: Load, env: Points, count: int, memo: dict[Node, Tensor]) -> Tensor:
        inner = dict(env) | {s.name: self._node(n, env, count, memo).long() for s, n in node.indirect}
        buffer = self.buffers[node.value]
        index = [torch.as_tensor(evaluate_expr(e, inner)).expand(count) for e in node.index]
        for i, size in zip(index, buffer.shape, strict=True):
            assert bool(((i >= 0) & (i < size)).all()), (
                f"{node.value}[{node.index}] reads outside {buffer.shape}"
            )
        return buffer[tuple(index)]

    def _fold(
        self,
        combine: Callable[[Tensor, Tensor], Tensor],
        axes: Iterable[Axis],
        env: Points,
        body: Callable[[Points], Tensor],
    ) -> Tensor:
        axes = list(axes)
        total: Tensor | None = None
        for index in itertools.product(*(range(evaluate_expr(a.extent, self.dims)) for a in axes)):
            value = body(dict(env) | {a.symbol.name: i for a, i in zip(axes, index, strict=True)})
            total = value if total is None else combine(total, value)
        assert total is not None, "a reduction over nothing"
        return total

    def points(self, segment: Segment) -> tuple[dict[str, Tensor], int]:
        """Every point of a segment, one after another."""
        sizes = [evaluate_expr(a.extent, self.dims) for a in segment.axes]
        rows = list(itertools.product(*map(range, sizes)))
        grid = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(sizes))
        return {a.symbol.name: grid[:, n] for n, a in enumerate(segment.axes)}, len(grid)


def run_loops(
    loops: Loops,
    inputs: Mapping[Value, Tensor],
    dims: Mapping[str, int],
    outputs: Mapping[Value, Tensor],
    order: Callable[[int], Iterable[Tensor]] = lambda count: [torch.arange(count)],
) -> dict[Value, Tensor]:
    """Run a kernel. Gives, for each output, how often each of its elements was written.

    outputs: where to store; a tensor of ``inputs`` when the kernel shall run in place. order: chunks of points, each of
    which is evaluated as a whole before its results are stored.
    """
    written = {v: torch.zeros(t.shape, dtype=torch.int64) for v, t in outputs.items()}
    run = Interpreter(inputs, dims)
    for segment in loops.segments:
        points, count = run.points(segment)
        for chunk in order(count):
            env: Points = dict(dims) | {name: index[chunk] for name, index in points.items()}
            memo: dict[Node, Tensor] = {}
            values = [run._node(store.value, env, len(chunk), memo) for store in segment.stores]
            for store, value in zip(segment.stores, values, strict=True):
                index = tuple(torch.as_tensor(evaluate_expr(e, env)).expand(len(chunk)) for e in store.index)
                if not index:
                    outputs[store.target].copy_(value[0])
                    written[store.target] += 1
                    continue
                outputs[store.target][index] = value.to(outputs[store.target].dtype)
                ones = torch.ones(len(chunk), dtype=torch.int64)
                written[store.target].index_put_(index, ones, accumulate=True)
    return written
