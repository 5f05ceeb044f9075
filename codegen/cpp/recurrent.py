"""Recurrent layers: the printer fills in sizes and types, the work is in ``recurrent.h``."""

from __future__ import annotations

from collections.abc import Iterable

from sympy import Expr

from tilewright.ir.module import Op

from .ctypes_of import STORAGE
from .expression import print_index
from .kernel_context import KernelContext


def print_causal_conv1d(kernel: KernelContext, op: Op) -> None:
    """Print the body of a kernel that is one ``causal_conv1d``."""
    x, weight, *bias = op.operands
    pointers = [kernel.names[v] for v in op.operands] + ([] if bias else ["nullptr"])
    _print_call(kernel, op, f"{STORAGE[x.dtype]}, {weight.shape[0]}", pointers, x.shape)


def print_selective_scan(kernel: KernelContext, op: Op) -> None:
    """Print the body of a kernel that is one ``selective_scan``."""
    x, _, decay, *_ = op.operands
    pointers = [kernel.names[v] for v in op.operands]
    _print_call(kernel, op, f"{STORAGE[x.dtype]}, {decay.shape[0]}", pointers, x.shape)


def print_linear_attention(kernel: KernelContext, op: Op) -> None:
    """Print the body of a kernel that is one ``linear_attention``."""
    q, _, v, decay, *beta = op.operands
    pointers = [kernel.names[x] for x in op.operands] + ([] if beta else ["nullptr"])
    kinds = f"{STORAGE[v.dtype]}, {q.shape[3]}, {decay.shape[3]}, {'true' if beta else 'false'}"
    _print_call(kernel, op, kinds, pointers, (*v.shape[:2], q.shape[2], *v.shape[2:]))


def _print_call(
    kernel: KernelContext, op: Op, kinds: str, pointers: list[str], extents: Iterable[Expr]
) -> None:
    sizes = [print_index(n) for n in extents]
    arguments = ", ".join(["worker", *sizes, *pointers, *(kernel.names[v] for v in op.results)])
    kernel.writer.line(f"tw::{op.opcode}<{kinds}>({arguments});")
