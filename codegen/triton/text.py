"""Building blocks of generated text: names, scopes of lines, and index expressions."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable

import sympy
from sympy import Expr

from tilewright.ir.errors import VerifyError
from tilewright.ir.index import FloorDiv

INDENT = "    "


class Names:
    """Fresh Python identifiers within one generated function."""

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self._taken = {"tl", "triton", "range", "float", "pid", *reserved}

    def fresh(self, hint: str) -> str:
        """The hint as an identifier when free, else with a number after it."""
        base = identifier(hint)
        name, number = base, 1
        while name in self._taken:
            name, number = f"{base}_{number}", number + 1
        self._taken.add(name)
        return name


def identifier(text: str) -> str:
    """``text`` with all that Python does not allow in a name replaced: ``0.norm -> v0_norm``."""
    name = re.sub(r"\W", "_", text) or "v"
    return f"v{name}" if name[0].isdigit() or keyword.iskeyword(name) else name


class Scope:
    """The lines of one block of code. A child is a loop body, which its parent receives when it is closed.

    Because a child's lines come after all that was added to the parent in the meantime, a value may be computed in
    the outermost scope that knows its operands: that is how loop-invariant code leaves a loop.
    """

    def __init__(self, names: Names, parent: Scope | None = None, indent: str = INDENT) -> None:
        self.names, self.parent, self.indent = names, parent, indent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.lines: list[str] = []
        self._known: dict[str, str] = {}

    def line(self, text: str) -> None:
        """Append a line."""
        self.lines.append(self.indent + text)

    def bind(self, text: str, hint: str = "t") -> str:
        """A variable that holds the pure expression ``text``; the same one for the same text in scope."""
        scope: Scope | None = self
        while scope is not None:
            if text in scope._known:
                return scope._known[text]
            scope = scope.parent
        name = self.names.fresh(hint)
        self.line(f"{name} = {text}")
        self._known[text] = name
        return name

    def constant(self, name: str, value: int) -> str:
        """Declare a compile-time constant of the kernel, once for equal values."""
        key = f"{name}: {value}"
        if key not in self._known:
            self._known[key] = self.names.fresh(name)
            self.line(f"{self._known[key]}: tl.constexpr = {value}")
        return self._known[key]

    def open(self, header: str) -> Scope:
        """Begin a loop; lines may still be added to this scope, before the loop, until :meth:`close`."""
        child = Scope(self.names, self, self.indent + INDENT)
        child.lines.append(self.indent + header)
        return child

    def close(self, child: Scope) -> None:
        """Append a finished loop."""
        self.lines.extend(child.lines)


def deepest(scopes: Iterable[Scope]) -> Scope:
    """The innermost of nested scopes."""
    return max(scopes, key=lambda scope: scope.depth)


def print_index(expr: Expr, name: Callable[[sympy.Symbol], str] = str, tight: bool = False) -> str:
    """An integer index expression as text that is valid in Python and in a kernel.

    ``name`` prints the symbols; ``tight`` asks for parentheses around anything but a number or a name.
    """

    def show(e: Expr, tight: bool) -> str:
        if e.is_Integer:
            return str(e) if e >= 0 or not tight else f"({e})"
        if e.is_Symbol:
            return name(e)
        match e.func.__name__:
            case "Add":
                parts = [show(t, False) for t in e.as_ordered_terms()]
                text = " + ".join(parts).replace("+ -", "- ")
            case "Mul":
                coefficient, factors = e.as_coeff_mul()
                shown = [show(f, True) for f in sorted(factors, key=sympy.default_sort_key)]
                sign = "-" if coefficient < 0 else ""
                if abs(coefficient) != 1:
                    shown.append(str(abs(coefficient)))
                text = sign + " * ".join(shown)
            case "Pow" if e.exp.is_Integer and e.exp > 0:
                text = " * ".join([show(e.base, True)] * int(e.exp))
            case "FloorDiv":
                text = f"{show(e.args[0], True)} // {show(e.args[1], True)}"
            case "Mod":
                text = f"{show(e.args[0], True)} % {show(e.args[1], True)}"
            case "Max" | "Min" as which:
                inner = [show(a, False) for a in sorted(e.args, key=sympy.default_sort_key)]
                text = inner[0]
                for other in inner[1:]:
                    text = f"tl.{'maximum' if which == 'Max' else 'minimum'}({text}, {other})"
                return text
            case other:
                raise VerifyError(f"cannot print {other} in an index expression: {e}")
        return f"({text})" if tight else text

    return show(sympy.sympify(expr), tight)


def ceil_div(extent: Expr, block: int) -> Expr:
    """Number of blocks that cover ``extent``."""
    return FloorDiv(sympy.expand(extent + block - 1), sympy.Integer(block))
