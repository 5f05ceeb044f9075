"""From groups to kernel ops in an order that can run."""

from __future__ import annotations

from collections.abc import Callable

from tilewright.ir.errors import VerifyError
from tilewright.ir.loops import PRIMITIVES
from tilewright.ir.module import Function, Op, make_attrs

from .groups import SOURCES, Groups


def emit(groups: Groups) -> Function:
    """The function with each group as one kernel op."""
    kernels = [k for k in (groups.kernel(members) for members in groups.groups if members) if k.results]
    rest = [op for n, op in enumerate(groups.ops) if n not in groups.owner and op.opcode not in SOURCES]
    ordered = _schedule([*rest, *kernels, *_loose_sources(groups, rest)], groups.function)
    name = _namer(groups.function.name)
    return groups.function.with_ops(
        op.with_attrs(name=name(op)) if op.opcode == "kernel" else op for op in ordered
    )


def _loose_sources(groups: Groups, rest: list[Op]) -> list[Op]:
    """Kernels for constants that are returned, or given to calls."""
    wanted = {v for op in rest for v in op.operands} | set(groups.function.returns)
    return [
        Op("kernel", (), make_attrs({"name": ""}), op.results, op.loc, (op,))
        for op in groups.ops
        if op.opcode in SOURCES and op.result in wanted
    ]


def _namer(function: str) -> Callable[[Op], str]:
    """Kernel names: function, running number, what it does."""
    count = 0

    def name(op: Op) -> str:
        nonlocal count
        opcodes = [o.opcode for o in op.body]
        kind = next(
            (k for k in ("matmul", *PRIMITIVES, "gather", "quantize", "reduce") if k in opcodes), "pointwise"
        )
        count += 1
        return f"{function}_{count - 1}_{kind}"

    return name


def _schedule(ops: list[Op], function: Function) -> list[Op]:
    """Topological order; among the ready, the one whose last result comes first in the source."""
    position = {v: n for n, op in enumerate(function.ops) for v in op.results}

    def key(op: Op) -> int:
        return max((position[v] for v in op.results), default=len(position))

    pending = sorted(ops, key=key)
    known = set(function.params)
    out: list[Op] = []
    while pending:
        ready = next((op for op in pending if all(v in known for v in op.operands)), None)
        if ready is None:
            raise VerifyError(f"@{function.name}: fusion made a cycle")
        pending.remove(ready)
        out.append(ready)
        known.update(ready.results)
    return out
