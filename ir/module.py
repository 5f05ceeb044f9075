"""Ops, functions and modules: frozen, compared by structure, values named in SSA form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import VerifyError
from .types import Value

Attr = Any
"""An attribute's value: int, float, str, bool, tuple of ints or names, sympy expression, IndexMap (``ops.OpSpec``)."""


@dataclass(frozen=True)
class Loc:
    """Where an op came from: the model module that ran it and the source line."""

    module: str = ""
    source: str = ""


@dataclass(frozen=True)
class Op:
    """One operation. ``attrs`` is sorted by name; ``body`` is non-empty for fused ``kernel`` ops only.

    The body of a kernel uses outer values directly, and the kernel's results are those body values
    that are used outside, so fusing and unfusing need no renaming.
    """

    opcode: str
    operands: tuple[Value, ...] = ()
    attrs: tuple[tuple[str, Attr], ...] = ()
    results: tuple[Value, ...] = ()
    loc: Loc = Loc()
    body: tuple[Op, ...] = ()

    def attr(self, name: str, default: Attr = None) -> Attr:
        """The attribute's value, or ``default`` when the op does not carry it."""
        return next((value for key, value in self.attrs if key == name), default)

    @property
    def result(self) -> Value:
        """The only result. Raises VerifyError where there are none or several."""
        if len(self.results) != 1:
            raise VerifyError(f"{self.opcode}: takes one result, not {len(self.results)}")
        return self.results[0]

    def with_attrs(self, **changes: Attr) -> Op:
        return replace(self, attrs=make_attrs({**dict(self.attrs), **changes}))

    def with_operands(self, table: Mapping[Value, Value]) -> Op:
        """This op with operands (and those of its body) replaced by ``table``."""
        if not any(v in table for v in self.operands) and not self.body:
            return self
        return replace(
            self,
            operands=tuple(table.get(v, v) for v in self.operands),
            body=tuple(op.with_operands(table) for op in self.body),
        )


def make_attrs(attrs: Mapping[str, Attr]) -> tuple[tuple[str, Attr], ...]:
    """Attributes in canonical order, without those that are None."""
    return tuple(sorted((k, v) for k, v in attrs.items() if v is not None))


@dataclass(frozen=True)
class Function:
    """A straight-line function: parameters, ops in execution order, returned values."""

    name: str
    params: tuple[Value, ...]
    ops: tuple[Op, ...]
    returns: tuple[Value, ...]

    def definitions(self) -> dict[Value, Op]:
        """The op that defines each value (parameters are not in it)."""
        return {v: op for op in self.ops for v in op.results}

    def users(self) -> dict[Value, list[Op]]:
        """The ops that use each value, in order; a returned value is not a use."""
        table: dict[Value, list[Op]] = {}
        for op in self.ops:
            for v in dict.fromkeys(op.operands):
                table.setdefault(v, []).append(op)
        return table

    def with_ops(self, ops: Iterable[Op], returns: Iterable[Value] | None = None) -> Function:
        return replace(self, ops=tuple(ops), returns=self.returns if returns is None else tuple(returns))

    def substitute(self, table: Mapping[Value, Value]) -> Function:
        """Replace uses of values, following chains in ``table``."""
        if not table:
            return self
        full = {old: _follow(old, table) for old in table}
        return self.with_ops(
            (op.with_operands(full) for op in self.ops), (full.get(v, v) for v in self.returns)
        )


def _follow(value: Value, table: Mapping[Value, Value]) -> Value:
    while value in table:
        value = table[value]
    return value


@dataclass(frozen=True)
class Module:
    """Functions over shared dim symbols. ``symbols`` gives each dim's inclusive range."""

    functions: tuple[Function, ...]
    symbols: tuple[tuple[str, int, int], ...] = ()
    entry: str = "main"

    def function(self, name: str) -> Function:
        return next(f for f in self.functions if f.name == name)

    @property
    def main(self) -> Function:
        return self.function(self.entry)

    def with_functions(self, functions: Iterable[Function]) -> Module:
        return replace(self, functions=tuple(functions))

    def with_symbols(self, **ranges: tuple[int, int]) -> Module:
        """Set or add the ranges of dim symbols."""
        table = {name: (lo, hi) for name, lo, hi in self.symbols} | ranges
        return replace(self, symbols=tuple((name, lo, hi) for name, (lo, hi) in sorted(table.items())))

    def __str__(self) -> str:
        from .printer import print_module

        return print_module(self)


def walk(ops: Iterable[Op]) -> Iterator[Op]:
    """Every op, those inside kernel bodies included (after the kernel itself)."""
    for op in ops:
        yield op
        yield from walk(op.body)


@dataclass
class Names:
    """A source of fresh value names for one function."""

    taken: set[str] = field(default_factory=set)
    counter: int = 0

    @staticmethod
    def of(function: Function) -> Names:
        taken = {v.name for v in function.params}
        taken |= {v.name for op in walk(function.ops) for v in op.results}
        return Names(taken)

    def fresh(self, hint: str = "") -> str:
        """A name not used so far: the hint itself when free, else a number (after the hint)."""
        name = hint
        while not name or name in self.taken:
            name = f"{hint}_{self.counter}" if hint else str(self.counter)
            self.counter += 1
        self.taken.add(name)
        return name
