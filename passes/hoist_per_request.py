"""Takes what stays the same for a whole request out of the programs that run once per step.

    main(%x, %states):                              once(%states):
      %k = matmul %states, %wk : [B, E, 64]           %k = matmul %states, %wk
      %y = matmul %x, %k       : [B, S, E]     =>     return %k
      return %y                                     main(%x, %k):
                                                      %y = matmul %x, %k
                                                      return %y

It is loop-invariant code motion, where the loop is the decoding of a request: the two parts become programs of their
own, and what lies between them is memory of the request. Which values are invariant is found by a binding-time analysis
(Jones, Gomard and Sestoft, "Partial Evaluation and Automatic Program Generation", 1993, chapter 4), in which inputs
are known at the request's start or vary from step to step, and weights are neither: both parts may read them.

For an encoder-decoder these are the keys and values of cross-attention.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import sympy

from tilewright.ir.index import IndexMap
from tilewright.ir.module import Function, Module, Names, Op, make_attrs
from tilewright.ir.types import Value

from .base import PassOptions
from .dce import eliminate_dead_code, has_effect


@dataclass(frozen=True)
class Hoisted:
    """once: from inputs that are known at a request's start to what the steps need of them. steps: the rest.

    The results of ``once`` are the inputs ``names`` of ``steps``, in order.
    """

    once: Module
    steps: Module
    names: tuple[str, ...]


def hoist_per_request(module: Module, known: Collection[str]) -> Hoisted | None:
    """Split a module whose inputs ``known`` are known at a request's start. None where there is nothing to move."""
    main = module.main
    inputs = {p for p in main.params if p.name in known}
    sizes = {s for p in inputs for d in p.shape for s in d.free_symbols}
    split = _Split(module, sizes)
    split.main(inputs)
    if not split.crossing:
        return None
    return Hoisted(split.once(), split.steps(), tuple(v.name for v in split.crossing))


class _Split:
    def __init__(self, module: Module, sizes: set[sympy.Symbol]) -> None:
        self.module = module
        self.sizes = sizes
        self.names = Names.of(module.main)
        self.parts: dict[str, _Part] = {}
        self.once_main: list[Op] = []
        self.steps_main: list[Op] = []
        self.crossing: list[Value] = []

    def main(self, inputs: set[Value]) -> None:
        """Split the callees, then the entry, whose calls become calls of either half."""
        main = self.module.main
        own = _Part.of(main, inputs, self.sizes)
        given = _arguments(main, own.early)
        for function in self.module.functions:
            if function.name in given:
                known = {p for p, early in zip(function.params, given[function.name], strict=True) if early}
                self.parts[function.name] = _Part.of(function, known, self.sizes)
        for op in main.ops:
            if op.opcode == "call":
                self._call(op)
                continue
            results = set(op.results)
            if results <= own.early | own.neutral:
                self.once_main.append(op)
            if not results <= own.early:
                self.steps_main.append(op)
        made = {v for op in main.ops for v in op.results} & own.early
        read = {v for op in self.steps_main for v in op.operands} | set(main.returns)
        self.crossing += [v for op in main.ops for v in op.results if v in made & read]

    def _call(self, op: Op) -> None:
        part = self.parts[op.attr("callee")]
        crossing = part.crossing()
        results = tuple(
            Value(self.names.fresh(f"{op.attr('scope')}_{v.name}".replace(".", "_")), v.type)
            for v in crossing
        )
        operands = dict(zip(part.function.params, op.operands, strict=True))
        if crossing:
            attrs = make_attrs({**dict(op.attrs), "callee": _once_name(part.function.name)})
            taken = tuple(operands[p] for p in part.once_params())
            self.once_main.append(Op("call", taken, attrs, results, op.loc))
            self.crossing += results
        kept = tuple(operands[p] for p in part.kept_params())
        self.steps_main.append(replace(op, operands=(*kept, *results)))

    def once(self) -> Module:
        main = self.module.main
        read = {v for op in self.once_main for v in op.operands}
        params = tuple(p for p in main.params if p in read)
        callees = [p.once() for p in self.parts.values() if p.crossing()]
        return self._module(Function(main.name, params, tuple(self.once_main), tuple(self.crossing)), callees)

    def steps(self) -> Module:
        main = self.module.main
        used = {v for op in self.steps_main for v in op.operands} | set(main.returns)
        params = (*(p for p in main.params if p in used), *self.crossing)
        function = Function(main.name, params, tuple(self.steps_main), main.returns)
        return self._module(function, [p.steps() for p in self.parts.values()])

    def _module(self, main: Function, callees: list[Function]) -> Module:
        module = eliminate_dead_code(self.module.with_functions((main, *callees)), PassOptions())
        used = {str(s) for f in module.functions for v in _values(f) for d in v.shape for s in d.free_symbols}
        return replace(module, symbols=tuple(row for row in module.symbols if row[0] in used))


@dataclass(frozen=True)
class _Part:
    """A function and its binding times: ``early`` values are known at a request's start, ``neutral`` ones depend on
    weights and constants alone; all others vary from step to step."""

    function: Function
    early: frozenset[Value]
    neutral: frozenset[Value]

    @staticmethod
    def of(function: Function, known: Collection[Value], sizes: set[sympy.Symbol]) -> _Part:
        early, neutral = set(known), set[Value]()
        for op in function.ops:
            if op.opcode == "call" or has_effect(op) or not _symbols(op) <= sizes:
                continue
            if all(v in neutral for v in op.operands):
                neutral.update(op.results)
            elif all(v in early or v in neutral for v in op.operands):
                early.update(op.results)
        return _Part(function, frozenset(early), frozenset(neutral))

    def crossing(self) -> tuple[Value, ...]:
        """Early values that are computed here and that something varying reads, in order."""
        used = set(self.function.returns)
        for op in self.function.ops:
            if not set(op.results) <= self.early:
                used.update(op.operands)
        made = (v for op in self.function.ops for v in op.results if v in self.early)
        return tuple(v for v in made if v in used)

    def once_params(self) -> tuple[Value, ...]:
        read = {v for op in self.once_ops() for v in op.operands}
        return tuple(p for p in self.function.params if p in read)

    def kept_params(self) -> tuple[Value, ...]:
        used = {v for op in self.steps_ops() for v in op.operands} | set(self.function.returns)
        return tuple(p for p in self.function.params if p in used)

    def steps_ops(self) -> list[Op]:
        return [op for op in self.function.ops if not set(op.results) <= self.early]

    def once_ops(self) -> list[Op]:
        return [op for op in self.function.ops if set(op.results) <= self.early | self.neutral]

    def once(self) -> Function:
        name = _once_name(self.function.name)
        return Function(name, self.once_params(), tuple(self.once_ops()), self.crossing())

    def steps(self) -> Function:
        params = (*self.kept_params(), *self.crossing())
        return Function(self.function.name, params, tuple(self.steps_ops()), self.function.returns)


def _arguments(main: Function, early: Collection[Value]) -> Mapping[str, tuple[bool, ...]]:
    """For each called function which arguments are known at a request's start, in all of its calls."""
    found: dict[str, tuple[bool, ...]] = {}
    for op in main.ops:
        if op.opcode == "call":
            here = tuple(v in early for v in op.operands)
            before = found.get(op.attr("callee"), here)
            found[op.attr("callee")] = tuple(a and b for a, b in zip(here, before, strict=True))
    return found


def _once_name(name: str) -> str:
    return f"{name}_once"


def _values(function: Function) -> list[Value]:
    return [*function.params, *(v for op in function.ops for v in op.results)]


def _symbols(op: Op) -> set[sympy.Symbol]:
    """Size symbols in an op's result types and dim expressions; indices of maps are no sizes."""
    found = {s for v in op.results for d in v.shape for s in d.free_symbols}
    for _, attr in op.attrs:
        if isinstance(attr, IndexMap):
            found |= {s for e in attr.exprs for s in e.free_symbols} - set(attr.symbols)
        elif isinstance(attr, sympy.Expr):
            found |= attr.free_symbols
    return found
