"""What printing one kernel needs to know of its surroundings: names, addresses and layouts of tensors, dim symbols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import sympy
from sympy import Expr, Integer

from tilewright.codegen.tunables import Changes
from tilewright.ir.errors import VerifyError
from tilewright.ir.index import linear_index, simplify
from tilewright.ir.loops import Node
from tilewright.ir.program import Step, physical_shape
from tilewright.ir.types import Value

from .ctypes_of import STORAGE
from .expression import print_index
from .writer import Writer, identifier


@dataclass
class Workspace:
    """Bytes of scratch that a kernel needs, as C++ expressions over dims: shared by the team, and of each thread."""

    shared: list[str] = field(default_factory=list)
    private: list[str] = field(default_factory=list)


@dataclass
class KernelContext:
    """Where a kernel's tensors are and how they lie in memory.

    names: C++ variable that points to each tensor. capacity: see ``physical_shape``. dims: symbols known at run time.
    changes: what a tuner replaced of the kernel's tile.
    """

    step: Step
    capacity: int
    dims: tuple[str, ...]
    writer: Writer
    changes: Changes = field(default_factory=dict)
    names: dict[Value, str] = field(default_factory=dict)
    workspace: Workspace = field(default_factory=Workspace)

    def declare(self) -> None:
        """Print the pointers to the tensors and the dims."""
        op = self.step.op
        slots = dict(zip((*op.operands, *op.results), (*self.step.reads, *self.step.writes), strict=True))
        for value, slot in slots.items():
            self.names[value] = f"p_{identifier(value.name)}"
            const = "" if value in op.results else "const "
            kind = f"{const}{STORAGE[value.dtype]}*"
            self.writer.line(
                f"{kind} {self.names[value]} = static_cast<{kind}>(slot[{slot}]);  // {value.type}"
            )

    def offset(self, value: Value, index: tuple[Expr, ...], ranges: Mapping[sympy.Symbol, Expr]) -> Expr:
        """Elements from a tensor's start to ``index``."""
        return simplify(linear_index(index, physical_shape(value.type, self.capacity)), ranges)

    def address(self, value: Value, index: tuple[Expr, ...], ranges: Mapping[sympy.Symbol, Expr]) -> str:
        """The lvalue of an element."""
        return f"{self.names[value]}[{print_index(self.offset(value, index, ranges))}]"

    def print_dims(self) -> None:
        """Dims as C++ constants; a compiler drops those that are not used."""
        for n, name in enumerate(self.dims):
            self.writer.line(f"[[maybe_unused]] const long {name} = dims[{n}];")


def coefficient(expr: Expr, symbol: sympy.Symbol) -> Expr | None:
    """``c`` of an expression ``c * symbol + rest`` in which neither part holds the symbol, else None."""
    expr = sympy.expand(expr)
    factor = expr.coeff(symbol, 1)
    rest = sympy.expand(expr - factor * symbol)
    return None if symbol in rest.free_symbols | factor.free_symbols else factor


def strides(expr: Expr, symbols: tuple[sympy.Symbol, ...], where: str) -> dict[sympy.Symbol, Expr]:
    """The coefficient of each symbol in an affine expression. Raises VerifyError when it is none."""
    found: dict[sympy.Symbol, Expr] = {}
    for symbol in symbols:
        factor = coefficient(expr, symbol)
        if factor is None:
            raise VerifyError(f"{where}: {expr} is not affine in {symbol}")
        found[symbol] = factor
    return found


def product(extents: list[Expr] | tuple[Expr, ...]) -> Expr:
    return sympy.prod(extents, start=Integer(1))


@lru_cache(maxsize=65536)
def contains(node: Node, kinds: tuple[type[Node], ...]) -> bool:
    """Whether a node or anything below it is of one of the kinds."""
    return isinstance(node, kinds) or any(contains(c, kinds) for c in node.children)
