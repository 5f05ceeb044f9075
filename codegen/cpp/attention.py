"""Attention kernels: shapes and strides are read off the types and the views, the work is in ``attention.h``."""

from __future__ import annotations

import sympy
from sympy import Expr, Integer

from tilewright.ir.attention import attention_extras
from tilewright.ir.errors import VerifyError
from tilewright.ir.index import sym
from tilewright.ir.loops import AttentionForm
from tilewright.ir.types import DType, Value

from .ctypes_of import STORAGE
from .expression import print_index
from .kernel_context import KernelContext, strides


def print_attention(kernel: KernelContext, form: AttentionForm) -> None:
    """Print the body of an attention kernel. Raises VerifyError for layouts that the primitives cannot write."""
    op, writer = form.op, kernel.writer
    q, k, v = op.operands[:3]
    extras = attention_extras(op, op.operands)
    split = op.opcode == "attention_split"
    writer.line("tw::AttentionShape shape{};")
    sizes = {
        "batch": q.shape[0],
        "heads": q.shape[1],
        "groups": k.shape[1],
        "queries": q.shape[2],
        "keys": k.shape[2],
    }
    for name, size in sizes.items():
        writer.line(f"shape.{name} = {print_index(size)};")
    for name, value in (("q", q), ("k", k), ("v", v)):
        writer.line(f"shape.{name} = {_strides(kernel, value, _symbols('bhsd'), name)};")
    for name, value in extras.items():
        writer.line(f"shape.{name} = {kernel.names[value]};")
    if (bias := extras.get("bias")) is not None:
        index = tuple(Integer(0) if d == 1 else sym(n) for d, n in zip(bias.shape[:3], "bhs", strict=True))
        writer.line(f"shape.bias_strides = {_strides(kernel, bias, (*index, sym('d')), 'bias')};")
    if "distances" in extras:
        writer.line(f"shape.distance_count = {print_index(extras['distances'].shape[1])};")
    if "mask" in extras:
        row = kernel.offset(extras["mask"], (Integer(1), Integer(0)), {})
        writer.line(f"shape.mask_row = {print_index(row)};")
    writer.line(f"shape.scale = {float(op.attr('scale'))!r}f;")
    writer.line(f"shape.scale_f64 = {float(op.attr('scale'))!r};")
    writer.line(f"shape.softcap = {float(op.attr('softcap'))!r}f;")
    writer.line(f"shape.causal = {str(bool(op.attr('causal'))).lower()};")
    writer.line(f"shape.window = {int(op.attr('window'))};")
    writer.line(f"shape.ahead = {int(op.attr('ahead', 0))};")
    writer.line("shape.prefetch_bytes = worker.team.prefetch_bytes;")
    kind = f"{STORAGE[q.dtype]}, {STORAGE[k.dtype]}, {q.shape[3]}, {v.shape[3]}"
    if q.dtype is DType.f64:
        kind = f"{q.shape[3]}, {v.shape[3]}"
    tensors = ", ".join(kernel.names[x] for x in (q, k, v))
    if split:
        _print_split(kernel, form, kind, tensors)
    else:
        _print_whole(kernel, form, kind, tensors, (q.shape[3], v.shape[3]))


def _print_whole(
    kernel: KernelContext, form: AttentionForm, kind: str, tensors: str, sizes: tuple[Expr, Expr]
) -> None:
    writer, f64 = kernel.writer, form.op.operands[0].dtype is DType.f64
    ((target, index),) = form.stores
    writer.line(f"shape.out = {_strides(kernel, target, index, 'result')};")
    result = kernel.names[target]
    if f64:
        writer.line(f"tw::attend_f64<{kind}>(worker, shape, {tensors}, {result});")
    else:
        scratch = "own, reinterpret_cast<float*>(shared)"
        writer.line(f"tw::attend<{kind}>(worker, shape, {tensors}, {result}, {scratch});")
    if not f64:
        batch, heads, queries = (print_index(n) for n in form.op.operands[0].shape[:3])
        parts = f"tw::attention_parts_floats({batch}, {heads}, {queries}, {sizes[1]}, threads)"
        kernel.workspace.shared.append(f"tw::bytes<float>({parts})")
        element_types = ", ".join(STORAGE[x.dtype] for x in form.op.operands[:2])
        kernel.workspace.private.append(f"tw::PromptScratch<{element_types}>::size({sizes[0]}, {sizes[1]})")


def _print_split(kernel: KernelContext, form: AttentionForm, kind: str, tensors: str) -> None:
    writer = kernel.writer
    writer.line("tw::Partials partials{};")
    for name, (target, index) in zip(("acc", "top", "total"), form.stores, strict=True):
        writer.line(f"partials.{name} = {kernel.names[target]};")
        writer.line(f"partials.{name}_strides = {_strides(kernel, target, index, name)};")
    writer.line(f"tw::attend_split<{kind}>(worker, shape, {form.op.attr('splits')}, {tensors}, partials);")


def _symbols(names: str) -> tuple[Expr, ...]:
    return tuple(sym(n) for n in names)


def _strides(kernel: KernelContext, value: Value, index: tuple[Expr, ...], where: str) -> str:
    """A ``tw::Strides`` for a tensor whose element at ``index`` belongs to b, h, s, d and p."""
    symbols: tuple[sympy.Symbol, ...] = tuple(sym(n) for n in "bhsdp")
    offset = kernel.offset(value, index, {})
    found = strides(offset, symbols, where)
    if sympy.expand(offset.xreplace(dict.fromkeys(symbols, Integer(0)))) != 0:
        raise VerifyError(
            f"attention {where}: the stored result does not start at its tensor's first element"
        )
    inner = found[sym("d")]
    if where != "result" and inner not in (0, 1):
        raise VerifyError(f"attention {where}: its last axis is not contiguous")
    return "{" + ", ".join(print_index(found[sym(n)]) for n in "bhsdp") + "}"
