"""Operands of products that Hopper's tensor memory accelerator (TMA) copies to shared memory.

A descriptor names a row-major matrix in memory and the size of a block of it. A single thread asks for a block by its
first row and column; none computes addresses of elements, and what lies outside the matrix reads as zero. Descriptors
are made on the host, by the function that launches a kernel, and go by value, so a recorded launch (a CUDA graph) keeps
them.

What TMA asks for (CUDA driver API, "Tensor Map Object Management"): a base and rows that are multiples of 16 bytes, and
at most 256 elements along each side of a block. A load that does not comply goes through addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy import Expr, Integer, Symbol

from tilewright.ir.index import simplify, sym
from tilewright.ir.loops import Load, Node
from tilewright.ir.types import Value

from .pointwise_ops import POINTER_TYPES

ALIGNMENT = 16
"""Bytes that divide a matrix's address and the size of its rows."""

LARGEST = 256
"""Elements along a side of a block."""


@dataclass(frozen=True)
class Descriptor:
    """The tensor that argument ``pointer`` points to, as a matrix [rows, columns] of ``element`` (Triton's name of the
    type) that is read in blocks of ``block``."""

    pointer: str
    element: str
    rows: Expr
    columns: int
    block: tuple[int, int]

    @property
    def name(self) -> str:
        """The kernel's argument."""
        return argument_name(self.pointer, self.block)

    @property
    def type(self) -> str:
        """The argument's type in a signature."""
        return f"tensordesc<{self.element}[{self.block[0]}, {self.block[1]}]>"


def argument_name(pointer: str, block: tuple[int, int]) -> str:
    return f"{pointer}_{block[0]}x{block[1]}"


def matrix_load(node: Node, k: Symbol) -> Load | None:
    """A factor that is loaded from rows along which ``k`` walks, such that TMA may copy it; else None."""
    if not isinstance(node, Load) or node.indirect or not node.index or not node.dtype.is_float:
        return None
    width = node.value.shape[-1]
    aligned = width.is_Integer and int(width) * node.dtype.itemsize % ALIGNMENT == 0
    *outer, inner = node.index
    elsewhere = frozenset().union(*(e.free_symbols for e in outer), (inner - k).free_symbols)
    return node if aligned and k not in elsewhere else None


def descriptor_of(value: Value, shape: tuple[Expr, ...], pointer: str, block: tuple[int, int]) -> Descriptor:
    """Describes a tensor laid out with ``shape``, whose rows are those of its innermost axis."""
    rows = sympy.expand(sympy.prod(shape[:-1], start=Integer(1)))
    return Descriptor(pointer, POINTER_TYPES[value.dtype], rows, int(shape[-1]), block)


def advances_by_one(row: Expr, lane: Symbol, size: int, extents: dict[Symbol, Expr]) -> bool:
    """Whether lane i of each block of ``size`` lanes has row r + i, where r is that of its first one.

    So it is for ``n + 32``, and for ``64 * (n // 32) + n % 32`` (a half of each head) in blocks of up to 32.
    """
    place = sym("place")
    within = row.xreplace({lane: size * lane + place})
    known = {s: e for s, e in extents.items() if s != lane} | {place: Integer(size)}
    return place not in (simplify(within, known) - place).free_symbols
