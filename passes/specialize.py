"""Turns dims that a program knows into constants.

symbol S [1, 512]                                  (S = 1)
%y = neg %x : f32[B, S, 64]          =>            %y = neg %x : f32[B, 1, 64]
"""

from __future__ import annotations

from typing import Any

import sympy

from tilewright.ir.index import IndexMap, sym
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.types import TensorType, Value

from .base import PassOptions


def specialize(module: Module, options: PassOptions) -> Module:
    """Substitute ``options.fixed`` into every type, index map and dim expression."""
    table = {sym(name): sympy.Integer(value) for name, value in options.fixed}
    if not table:
        return module
    kept = tuple(row for row in module.symbols if sym(row[0]) not in table)
    functions = tuple(_function(f, table) for f in module.functions)
    return Module(functions, kept, module.entry)


Table = dict[sympy.Symbol, sympy.Expr]


def _value(value: Value, table: Table) -> Value:
    return Value(value.name, TensorType(value.dtype, tuple(d.xreplace(table) for d in value.shape)))


def _attr(attr: Any, table: Table) -> Any:
    if isinstance(attr, IndexMap):
        return IndexMap(attr.rank, tuple(e.xreplace(table) for e in attr.exprs))
    return attr.xreplace(table) if isinstance(attr, sympy.Expr) else attr


def _op(op: Op, table: Table) -> Op:
    return Op(
        op.opcode,
        tuple(_value(v, table) for v in op.operands),
        tuple((k, _attr(v, table)) for k, v in op.attrs),
        tuple(_value(v, table) for v in op.results),
        op.loc,
        tuple(_op(o, table) for o in op.body),
    )


def _function(f: Function, table: Table) -> Function:
    return Function(
        f.name,
        tuple(_value(v, table) for v in f.params),
        tuple(_op(op, table) for op in f.ops),
        tuple(_value(v, table) for v in f.returns),
    )
