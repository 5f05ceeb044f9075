"""Plans memory: turns a fused module into a program in which every value has a place and nothing is allocated.

    %a = kernel %x ..      [lives 0..1]          arena: a @ 0, b @ 4096
    %b = kernel %a ..      [lives 1..2]    =>           c @ 0           (a is dead; or c in place of b,
    %c = kernel %b ..      [lives 2..3]                                  when each element of c reads its own of b)

Each function is planned once. Its values that die inside it form a *frame*, placed in the arena by the caller; what it
returns lives in the caller's memory. Values of one function that may share memory *in place* (an elementwise chain,
such as the residual stream) form one class. Classes whose lifetimes intersect are neighbours in an interference
graph; they are placed by decreasing size at the lowest offset that no placed neighbour covers (the greedy-by-size
planner of Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020).

``ir.check_plan`` checks the result without sharing any of this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx

from tilewright.ir.check_plan import check_plan
from tilewright.ir.loops import PRIMITIVES, elementwise_inputs, scalarize
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.program import (
    Buffer,
    BufferKind,
    Call,
    Program,
    Routine,
    Sizes,
    Step,
    largest_sizes,
    physical_shape,
)
from tilewright.ir.recurrent import state_of
from tilewright.ir.reference import join_scope
from tilewright.ir.types import Value, concrete

ALIGNMENT = 64
"""Bytes; a cache line, and a full AVX-512 vector."""


@dataclass
class _Class:
    """Values that share memory in place, and live in ops ``first`` to ``last``.

    returned: the returned value whose memory, given by the caller, they use; None where an offset in the function's
    frame is ours to choose. over: the function's parameters whose memory they may use, if the caller lets it.
    """

    members: list[Value]
    first: int
    last: int
    nbytes: int
    returned: Value | None = None
    over: frozenset[Value] = frozenset()


@dataclass
class _FunctionPlan:
    """Where each value of a function lives."""

    function: Function
    classes: list[_Class] = field(default_factory=list)
    of: dict[Value, _Class] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0

    def in_place(self) -> frozenset[tuple[int, int]]:
        """Pairs (parameter number, return number) that the caller may place in one buffer."""
        pairs = set()
        for number, value in enumerate(self.function.returns):
            home = self.of.get(value)
            for position, parameter in enumerate(self.function.params):
                if home is not None and parameter in home.over:
                    pairs.add((position, number))
        return frozenset(pairs)


def plan_memory(
    module: Module,
    name: str,
    phase: str,
    batch: int,
    capacity: int,
    together: Sequence[Mapping[str, int]] = (),
) -> Program:
    """Plan a fused module whose symbols' upper bounds are the sizes to plan for; or, where there are any, those that
    may occur ``together``.

    capacity: the length that KV states and masks are laid out for. Raises VerifyError when the plan fails its check.
    """
    planner = _Planner(module, capacity, tuple(map(dict, together)))
    program = planner.program(name, phase, batch)
    check_plan(program)
    return program


class _Planner:
    def __init__(self, module: Module, capacity: int, together: tuple[Sizes, ...]) -> None:
        self.module = module
        self.capacity = capacity
        self.together = together
        self.largest = largest_sizes(module.symbols, together)
        self.plans: dict[str, _FunctionPlan] = {}
        called = {op.attr("callee") for f in module.functions for op in f.ops if op.opcode == "call"}
        for function in module.functions:
            if function.name in called:
                self.plans[function.name] = self._plan(function, entry=False)
        self.main = self._plan(module.main, entry=True)

    def _nbytes(self, value: Value) -> int:
        shape = physical_shape(value.type, self.capacity)
        size = value.dtype.itemsize * max(math.prod(concrete(shape, sizes)) for sizes in self.largest)
        return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT

    # -- one function ------------------------------------------------------------------------------------------

    def _plan(self, function: Function, entry: bool) -> _FunctionPlan:
        plan = _FunctionPlan(function)
        ops = [op for op in function.ops if op.opcode != "param"]
        last = {v: n for n, op in enumerate(ops) for v in op.operands}
        for n, op in enumerate(ops):
            for value in op.results:
                if value not in _states(op):
                    self._add(plan, value, n, last, op, entry)
        self._place(plan, ops)
        return plan

    def _add(
        self, plan: _FunctionPlan, value: Value, n: int, last: Mapping[Value, int], op: Op, entry: bool
    ) -> None:
        """Give a value a class: that of an operand that it can overwrite, or a new one."""
        returned = plan.function.returns
        dying = [v for v in op.operands if last[v] == n and v not in returned and op.operands.count(v) == 1]
        pairs = self._in_place(op)
        overwritable = [v for v in dying if (v, value) in pairs and v.type == value.type]
        for v in overwritable:
            home = plan.of.get(v)
            # Another result of this op may have taken the operand's place already.
            free = home is not None and home.members[-1] == v
            if home is not None and free and not (home.returned is not None and value in returned):
                home.members.append(value)
                home.last = last.get(value, n)
                home.returned = value if value in returned else home.returned
                plan.of[value] = home
                return
        over = frozenset(v for v in overwritable if v in plan.function.params and not entry)
        kept = value if value in returned else None
        new = _Class([value], n, last.get(value, n), self._nbytes(value), kept, over)
        plan.classes.append(new)
        plan.of[value] = new

    def _in_place(self, op: Op) -> frozenset[tuple[Value, Value]]:
        """Pairs (operand, result) that may share memory while the op runs."""
        if op.opcode == "call":
            callee = self.plans[op.attr("callee")]
            return frozenset((op.operands[a], op.results[r]) for a, r in callee.in_place())
        if op.opcode != "kernel" or any(o.opcode in PRIMITIVES for o in op.body):
            return frozenset()
        return elementwise_inputs(scalarize(op))

    def _place(self, plan: _FunctionPlan, ops: list[Op]) -> None:
        """Offsets for the function's own classes and for the frames of what it calls."""
        graph: nx.Graph[object] = nx.Graph()
        spans: dict[object, tuple[int, int, int]] = {}
        for number, c in enumerate(plan.classes):
            if c.returned is None:
                spans[number] = (c.first, c.last, c.nbytes)
        for n, op in enumerate(ops):
            if op.opcode == "call":
                callee = op.attr("callee")
                first = spans.get(callee, (n, n, 0))[0]
                spans[callee] = (first, n, self.plans[callee].nbytes)
        graph.add_nodes_from(spans)
        keys = list(spans)
        for i, a in enumerate(keys):
            for b in keys[i + 1 :]:
                if spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]:
                    graph.add_edge(a, b)
        placed: dict[object, int] = {}
        for key in sorted(keys, key=lambda k: (-spans[k][2], str(k))):
            taken = sorted((placed[o], placed[o] + spans[o][2]) for o in graph.neighbors(key) if o in placed)
            placed[key] = _lowest_gap(taken, spans[key][2])
        plan.offsets = {k: v for k, v in placed.items() if isinstance(k, int)}
        plan.frames = {k: v for k, v in placed.items() if isinstance(k, str)}
        plan.nbytes = max((placed[k] + spans[k][2] for k in keys), default=0)

    # -- the program -------------------------------------------------------------------------------------------

    def program(self, name: str, phase: str, batch: int) -> Program:
        table = _Buffers()
        main = self.module.main
        for p in main.params:
            table.add(p.name, BufferKind.input, p)
        bound = {p: table.numbers[(BufferKind.input, p.name)] for p in main.params}
        for n, value in enumerate(main.returns):
            bound.update(
                dict.fromkeys(self.main.of[value].members, table.add(f"output{n}", BufferKind.output, value))
            )
        for number, c in enumerate(self.main.classes):
            if c.returned is None:
                first, offset = c.members[0], self.main.offsets[number]
                placed = table.add(f"main.{first.name}", BufferKind.arena, first, offset, c.nbytes)
                bound.update(dict.fromkeys(c.members, placed))
        weights = {op.result: str(op.attr("name")) for op in main.ops if op.opcode == "param"}
        routines: list[Routine] = []
        calls: list[Call] = []
        index: dict[str, int] = {}
        pending: list[Op] = []

        def flush() -> None:
            """Close the run of kernels between two calls as a routine of its own."""
            if pending:
                function = main.with_ops([op for op in main.ops if op.opcode == "param"] + pending)
                routine = _routine(function, f"{main.name}_{len(routines)}")
                routines.append(routine)
                calls.append(Call(len(routines) - 1, self._bind(routine, function, "", bound, table)))
                pending.clear()

        for op in main.ops:
            if op.opcode == "call":
                flush()
                for value in op.operands:
                    if value in weights:  # a layer may be given a weight of the whole model
                        bound[value] = table.add(weights[value], BufferKind.param, value)
                callee = self.module.function(op.attr("callee"))
                if callee.name not in index:
                    index[callee.name] = len(routines)
                    routines.append(_routine(callee, callee.name))
                routine = routines[index[callee.name]]
                given = self._frame(op, bound, table)
                buffers = self._bind(routine, callee, op.attr("scope"), given, table)
                calls.append(Call(index[callee.name], buffers, op.attr("scope")))
            elif op.opcode != "param":
                pending.append(op)
        flush()
        return Program(
            name, phase, batch, self.module.symbols, self.capacity, tuple(table.buffers), tuple(routines),
            tuple(calls), self.main.nbytes, self.together,
        )  # fmt: skip

    def _frame(self, op: Op, bound: Mapping[Value, int], table: _Buffers) -> dict[Value, int]:
        """Buffers of a callee's parameters, returns and frame values for one call."""
        plan = self.plans[op.attr("callee")]
        given = {p: bound[v] for p, v in zip(plan.function.params, op.operands, strict=True)}
        for value, result in zip(plan.function.returns, op.results, strict=True):
            given.update(dict.fromkeys(plan.of[value].members, bound[result]))
        base = self.main.frames[op.attr("callee")]
        for number, c in enumerate(plan.classes):
            if c.returned is None:
                label = f"{plan.function.name}.{c.members[0].name}"
                placed = table.add(
                    label, BufferKind.arena, c.members[0], base + plan.offsets[number], c.nbytes
                )
                given.update(dict.fromkeys(c.members, placed))
        return given

    def _bind(
        self, routine: Routine, function: Function, scope: str, given: Mapping[Value, int], table: _Buffers
    ) -> tuple[int, ...]:
        """The buffer of each slot of a routine for one call."""
        weights = {op.result: str(op.attr("name")) for op in function.ops if op.opcode == "param"}
        states = {v: s for op in function.ops for v, s in _states(op).items()}
        numbers = []
        for value in routine.slots:
            if value in given:
                numbers.append(given[value])
            elif value in weights:
                numbers.append(table.add(join_scope(scope, weights[value]), BufferKind.param, value))
            else:
                numbers.append(table.add(join_scope(scope, states[value]), BufferKind.state, value))
        return tuple(numbers)


@dataclass
class _Buffers:
    """The growing buffer table; adding what is there gives its number."""

    buffers: list[Buffer] = field(default_factory=list)
    numbers: dict[tuple[BufferKind, str], int] = field(default_factory=dict)

    def add(self, name: str, kind: BufferKind, value: Value, offset: int = 0, nbytes: int = 0) -> int:
        if (kind, name) not in self.numbers:
            self.numbers[kind, name] = len(self.buffers)
            self.buffers.append(Buffer(name, kind, value.type, offset, nbytes))
        return self.numbers[kind, name]


def _states(op: Op) -> dict[Value, str]:
    """Results of a kernel that live in the request's state -> slot."""
    found = ((state_of(o), str(o.attr("slot"))) for o in op.body)
    return {value: slot for value, slot in found if value is not None}


def _lowest_gap(taken: Iterable[tuple[int, int]], nbytes: int) -> int:
    offset = 0
    for start, end in taken:
        if start - offset >= nbytes:
            break
        offset = max(offset, end)
    return offset


def _routine(function: Function, name: str) -> Routine:
    steps_ops = [op for op in function.ops if op.opcode != "param"]
    slots = list(dict.fromkeys(v for op in steps_ops for v in (*op.operands, *op.results)))
    number = {v: n for n, v in enumerate(slots)}
    steps = tuple(
        Step(op, tuple(number[v] for v in op.operands), tuple(number[v] for v in op.results))
        for op in steps_ops
    )
    return Routine(name, tuple(slots), steps)
