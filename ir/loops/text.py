"""Text of the loop form, for people."""

from __future__ import annotations

import re

from ..errors import VerifyError
from ..index import format_expr
from .nodes import Apply, Const, Dot, Index, Load, Loops, Node, Reduce


def print_node(node: Node) -> str:
    """Text of a scalar expression."""
    match node:
        case Load(value=value, index=index, indirect=indirect):
            parts = [format_expr(e) for e in index]
            for symbol, node_of in indirect:
                picked = print_node(node_of).replace("\\", r"\\")
                parts = [re.sub(rf"\b{symbol}\b", picked, part) for part in parts]
            return f"{value}[{', '.join(parts)}]"
        case Const(value=value):
            return repr(value)
        case Index(expr=expr):
            return f"({format_expr(expr)})"
        case Apply(op=op, args=args):
            return f"{op}{':' + node.dtype.value if op == 'cast' else ''}({', '.join(map(print_node, args))})"
        case Reduce(kind=kind, axes=axes, body=body):
            return f"{kind}({', '.join(f'{a.symbol} < {a.extent}' for a in axes)}: {print_node(body)})"
        case Dot(a=a, b=b, axis=axis, activation_group=group):
            rounded = f", a in int8 by {group}" if group else ""
            return f"dot({axis.symbol} < {axis.extent}: {print_node(a)}, {print_node(b)}{rounded})"
    raise VerifyError(f"unknown node {type(node).__name__}")


def print_loops(loops: Loops) -> str:
    """Text of the loop form, for people."""
    lines = [
        f"loops {loops.name}({', '.join(map(str, loops.inputs))}) -> {', '.join(map(str, loops.outputs))}"
    ]
    for segment in loops.segments:
        lines.append(
            f"  for {', '.join(f'{a.symbol} < {format_expr(a.extent)}' for a in segment.axes) or 'once'}:"
        )
        for store in segment.stores:
            where = ", ".join(map(format_expr, store.index))
            lines.append(f"    {store.target}[{where}] = {print_node(store.value)}")
    return "\n".join(lines) + "\n"
