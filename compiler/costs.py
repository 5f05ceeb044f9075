"""What a program costs: bytes moved and floating-point operations per kernel, and eager's memory for comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tilewright.ir.module import Function, Module, Op
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.program import Program, Step
from tilewright.ir.recurrent import RECURRENT
from tilewright.ir.types import Value, concrete

Dims = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """Bytes that have to come from or go to memory at least once, and floating-point operations."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.bytes * times, self.flops * times)


def program_cost(program: Program, dims: Dims) -> Cost:
    """One run of a program at the given dim sizes."""
    routines = [sum((step_cost(s, dims) for s in r.steps), Cost()) for r in program.routines]
    return sum((routines[c.routine] for c in program.calls), Cost())


def step_cost(step: Step, dims: Dims) -> Cost:
    """One kernel or PyTorch call; every operand is read once and every result written once.

    Exceptions: of a table that is only gathered from, what is gathered; of the weights of experts, those that are
    chosen, at most; of a KV cache that is appended to, the new rows. The state of a recurrent layer is also read.
    """
    op = step.op
    body = op.body or (op,)
    read = sum(_read_bytes(v, body, dims) for v in op.operands)
    appended = {o.result: o.operands[0] for o in body if o.opcode == "append"}
    written = sum(_nbytes(appended.get(v, v), dims) for v in op.results)
    written += sum(_nbytes(o.results[1], dims) for o in body if o.opcode in RECURRENT)
    return Cost(read + written, sum(_flops(o, dims) for o in body))


def _nbytes(value: Value, dims: Dims) -> int:
    return math.prod(concrete(value.shape, dims)) * value.dtype.itemsize


def _read_bytes(value: Value, body: tuple[Op, ...], dims: Dims) -> int:
    users = [o for o in body if value in o.operands]
    if users and all(o.opcode == "gather" and o.operands[1] != value for o in users):
        return sum(_nbytes(o.result, dims) for o in users)
    if users and all(o.opcode in _CHOSEN and value in o.operands[3:] for o in users):
        chosen = sum(_CHOSEN[o.opcode](o, dims) for o in users)
        experts = concrete(value.shape[:1], dims)[0]
        return _nbytes(value, dims) * min(experts, chosen) // experts
    if users and all(o.opcode in _TABLE_FORMS for o in users) and value.type.numel.is_Integer:
        # A table in another form, as codes: of each of its parts, as large a share is read as of the whole.
        reached = [u for o in users for u in _lookups(o.result, body)]
        if reached and None not in reached:
            share = sum(_nbytes(g.result, dims) / _nbytes(g.operands[0], dims) for g in reached if g)
            return min(_nbytes(value, dims), math.ceil(_nbytes(value, dims) * share))
    return _nbytes(value, dims)


_CHOSEN: dict[str, Callable[[Op, Dims], int]] = {
    "experts": lambda op, dims: math.prod(concrete(op.operands[1].shape, dims)),
    "grouped_matmul": lambda op, dims: concrete(op.result.shape[:1], dims)[0],
}
"""Pairs of a token and an expert that it chose, of the ops whose operands from the fourth on are weights of experts."""

_TABLE_FORMS = ("view", "dequantize")


def _lookups(value: Value, body: tuple[Op, ...]) -> list[Op | None]:
    """The gathers from a table that ``value`` is a form of; None among them for any other use."""
    found: list[Op | None] = []
    for op in body:
        if value in op.operands:
            if op.opcode == "gather" and op.operands[1] != value:
                found.append(op)
            else:
                found += _lookups(op.result, body) if op.opcode in _TABLE_FORMS else [None]
    return found


def _flops(op: Op, dims: Dims) -> int:
    if op.opcode in ("matmul", "grouped_matmul"):
        return 2 * math.prod(concrete(op.result.shape, dims)) * concrete(op.operands[0].shape[-1:], dims)[0]
    if op.opcode in ("attention", "attention_split"):
        q, _, v = op.operands[:3]
        batch, heads, new, size = concrete(q.shape, dims)
        context = dims["T"] if op.attr("slot") else concrete(v.shape[2:3], dims)[0]
        return 2 * batch * heads * new * context * (size + concrete(v.shape[3:], dims)[0])
    if op.opcode == "experts":
        return 6 * _CHOSEN["experts"](op, dims) * math.prod(concrete(op.operands[4].shape[1:], dims))
    if op.opcode == "causal_conv1d":
        return 2 * math.prod(concrete((*op.operands[0].shape, op.operands[1].shape[0]), dims))
    if op.opcode == "selective_scan":
        return 6 * math.prod(concrete((*op.operands[0].shape, op.operands[2].shape[0]), dims))
    if op.opcode == "linear_attention":
        each = 5 if len(op.operands) == 4 else 7
        return each * math.prod(concrete((*op.operands[2].shape, op.operands[0].shape[3]), dims))
    if op.opcode == "reduce":
        return math.prod(concrete(op.operands[0].shape, dims))
    if op.opcode in POINTWISE and op.results[0].dtype.is_float:
        return math.prod(concrete(op.result.shape, dims))
    return 0


def eager_peak(module: Module, dims: Dims) -> int:
    """Peak bytes of activations if every op of an unfused module allocated its result, as eager PyTorch does.

    Views are free and a value is freed after its last use, so this is a lower bound of eager's peak: Python code keeps
    some values for longer. Weights, inputs and KV state are not counted.
    """
    called = {op.attr("callee") for f in module.functions for op in f.ops if op.opcode == "call"}
    peaks = {f.name: _peak(f, dims, {}) for f in module.functions if f.name in called}
    return _peak(module.main, dims, peaks)


def _peak(function: Function, dims: Dims, callees: Mapping[str, int]) -> int:
    root: dict[Value, Value] = {}
    last: dict[Value, int] = {}
    for n, op in enumerate(function.ops):
        if op.opcode == "view":
            root[op.result] = root.get(op.operands[0], op.operands[0])
        for v in op.operands:
            last[root.get(v, v)] = n
    last.update({root.get(v, v): len(function.ops) for v in function.returns})
    live = peak = 0
    held: dict[Value, int] = {}
    for n, op in enumerate(function.ops):
        if op.opcode not in ("param", "const", "view", "append"):
            held.update({v: _nbytes(v, dims) for v in op.results if v in last})
            live = sum(held.values())
        inner = callees.get(str(op.attr("callee")), 0) if op.opcode == "call" else 0
        peak = max(peak, live + inner)
        for v in [v for v in held if last[v] <= n]:
            del held[v]
    return peak
