"""Experts: the printer fills in sizes, types and the gate, the work is in ``experts.h``."""

from __future__ import annotations

from sympy import prod

from tilewright.ir.errors import VerifyError
from tilewright.ir.experts import Gate, experts_extras
from tilewright.ir.module import Op
from tilewright.ir.types import DType

from .ctypes_of import STORAGE
from .expression import print_index
from .kernel_context import KernelContext

_ACTIVATIONS = {
    "silu": "{g} * tw::sigmoid({alpha} * {g})",
    "gelu": "0.5f * {g} * (1.0f + tw::erf({g} * 0.70710678f))",
    "gelu_tanh": "0.5f * {g} * (1.0f + tw::tanh(0.79788456f * ({g} + 0.044715f * tw::cube({g}))))",
    "relu": "tw::maximum({g}, 0.0f)",
}


def print_experts(kernel: KernelContext, op: Op) -> None:
    """Print the body of an experts kernel. Raises VerifyError for float64, which it does not compute in."""
    x, ids, scores, gate_up, down = op.operands[:5]
    if x.dtype is DType.f64 or scores.dtype is DType.f64:
        raise VerifyError("experts are not computed in float64")
    writer, extras = kernel.writer, experts_extras(op, op.operands)
    transposed = bool(op.attr("transposed", False))
    sizes = (
        prod(x.shape[:-1]), ids.shape[-1], gate_up.shape[0], x.shape[-1], down.shape[1 if transposed else 2],
    )  # fmt: skip
    size_list = ", ".join(print_index(n) for n in sizes)
    writer.line(f"const tw::ExpertsShape shape{{{size_list}, worker.team.prefetch_bytes}};")
    gate = Gate.of(op)
    with writer.block("const auto gate = [](float g, float u)", "};"):
        for line in _gate_lines(gate):
            writer.line(line)
    kinds = f"{STORAGE[x.dtype]}, {str(transposed).lower()}"
    pointers = [kernel.names[v] for v in (x, ids, scores, gate_up, down)]
    pointers += [kernel.names[extras[n]] if n in extras else "nullptr" for n in ("gate_up_bias", "down_bias")]
    arguments = ", ".join([*pointers, kernel.names[op.result]])
    interleaved = str(gate.interleaved).lower()
    writer.line(f"tw::experts<{kinds}, {interleaved}>(worker, shape, {arguments}, shared, own, gate);")
    kernel.workspace.shared.append(
        f"tw::experts_shared_bytes<{STORAGE[x.dtype]}>(tw::ExpertsShape{{{size_list}, 0}})"
    )
    kernel.workspace.private.append(
        f"tw::experts_private_bytes<{STORAGE[x.dtype]}>(tw::ExpertsShape{{{size_list}, 0}})"
    )


def _gate_lines(gate: Gate) -> list[str]:
    """Statements that return what becomes of a gate ``g`` and an up ``u``."""
    lines = []
    if gate.limit:
        lines.append(f"g = tw::minimum(g, {gate.limit!r}f);")
        lines.append(f"u = tw::minimum(tw::maximum(u, {-gate.limit!r}f), {gate.limit!r}f);")
    activated = _ACTIVATIONS[gate.activation].format(g="g", alpha=f"{gate.alpha!r}f")
    up = f"(u + {gate.offset!r}f)" if gate.offset else "u"
    return [*lines, f"return ({activated}) * {up};"]
