"""IR text. :func:`ir.parser.parse_module` reads it back to an equal module.

symbol B [1, 4]
symbol S [1, 512]

func @main(%x: f32[B, S, 64]) -> (%3) {
  %w = param {name = "norm.weight"} : f32[64]
  %3 = mul %x, %w : f32[B, S, 64]  @ "norm" "modeling_llama.py:63"
}
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from .index import IndexMap, format_expr
from .module import Attr, Function, Module, Op
from .ops import OPS
from .types import Value


def format_attr(kind: str, value: Attr) -> str:
    """Text of an attribute of the given kind (see ``ops.OpSpec``)."""
    match kind:
        case "str":
            return json.dumps(value)
        case "bool":
            return "true" if value else "false"
        case "number" if isinstance(value, bool):
            return "true" if value else "false"
        case "float" | "number" | "int":
            return repr(value)
        case "ints" | "names":
            return f"({', '.join(map(str, value))})"
        case "expr":
            return format_expr(value)
        case "map":
            assert isinstance(value, IndexMap)
            return str(value)
    raise ValueError(f"unknown attribute kind {kind}")


def print_op(op: Op, indent: str = "  ") -> str:
    """One op, over several lines when it has a body."""
    names = ", ".join(map(str, op.results))
    operands = ", ".join(map(str, op.operands))
    kinds = OPS[op.opcode].attrs if op.opcode in OPS else {}
    attrs = ", ".join(f"{k} = {format_attr(kinds.get(k, 'number'), v)}" for k, v in op.attrs)
    line = f"{indent}{names + ' = ' if names else ''}{op.opcode}"
    line += f" {operands}" if operands else ""
    line += f" {{{attrs}}}" if attrs else ""
    if op.body:
        inner = "\n".join(print_op(o, indent + "  ") for o in op.body)
        line += f" [\n{inner}\n{indent}]"
    if op.results:
        types = ", ".join(str(v.type) for v in op.results)
        line += f" : {types}" if len(op.results) == 1 else f" : ({types})"
    if op.loc.module or op.loc.source:
        line += f"  @ {json.dumps(op.loc.module)} {json.dumps(op.loc.source)}"
    return line


def _typed(values: Iterable[Value]) -> str:
    return ", ".join(f"{v}: {v.type}" for v in values)


def print_function(function: Function) -> str:
    """One function."""
    head = f"func @{function.name}({_typed(function.params)}) -> ({', '.join(map(str, function.returns))}) {{"
    return "\n".join([head, *(print_op(op) for op in function.ops), "}"])


def print_module(module: Module) -> str:
    """The whole module, ending in a newline."""
    head = [f"entry @{module.entry}"] + [f"symbol {name} [{lo}, {hi}]" for name, lo, hi in module.symbols]
    return "\n\n".join(["\n".join(head), *(print_function(f) for f in module.functions)]) + "\n"
