"""One fused kernel as one C++ function: a comment that says where it came from, then its segments."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.codegen.tunables import NONE, Changes
from tilewright.ir.errors import VerifyError
from tilewright.ir.loops import PRIMITIVES, Loops, attention_form, scalarize, sole_op
from tilewright.ir.module import Op
from tilewright.ir.program import Step

from .attention import print_attention
from .experts import print_experts
from .expression import print_index
from .kernel_context import KernelContext, Workspace
from .matmul import group_candidates, print_matmuls
from .matmul_group import matmul_groups
from .pointwise import print_loops
from .recurrent import print_causal_conv1d, print_linear_attention, print_selective_scan
from .writer import Writer, identifier

_SOLE = {
    "experts": print_experts, "causal_conv1d": print_causal_conv1d, "selective_scan": print_selective_scan,
    "linear_attention": print_linear_attention,
}  # fmt: skip


@dataclass(frozen=True)
class PrintedKernel:
    """A kernel's function (``name(worker, dims, slot, shared, own)``) and the scratch that it needs."""

    name: str
    text: str
    workspace: Workspace


def print_kernel(step: Step, capacity: int, dims: tuple[str, ...], changes: Changes = NONE) -> PrintedKernel:
    """Print a kernel step; ``changes`` replace fields of its tile. Raises VerifyError when its body has no C++ form."""
    writer = Writer()
    kernel = KernelContext(step, capacity, dims, writer, changes)
    name = identifier(step.name)
    _comment(writer, step.op)
    arguments = "const tw::Worker& worker, const long* dims, void* const* slot, char* shared, char* own"
    with writer.block(
        f"static void {name}([[maybe_unused]] {arguments.replace(', ', ', [[maybe_unused]] ')})"
    ):
        kernel.print_dims()
        kernel.declare()
        form, sole = attention_form(step.op), sole_op(step.op)
        if form is not None:
            print_attention(kernel, form)
        elif sole is not None:
            _print_sole(kernel, sole)
        else:
            _print_segments(kernel, scalarize(step.op))
    return PrintedKernel(name, writer.text(), kernel.workspace)


def _print_sole(kernel: KernelContext, op: Op) -> None:
    if op.opcode not in _SOLE:
        raise VerifyError(f"{op.opcode} has no C++ form: experts are one op there")
    _SOLE[op.opcode](kernel, op)


def candidates(op: Op) -> tuple[Changes, ...]:
    """Ways to print a kernel that are worth a measurement, the default first; a single one where there is no choice."""
    if any(o.opcode in PRIMITIVES for o in op.body):
        return (NONE,)
    groups, _ = matmul_groups(scalarize(op).segments)
    found = dict.fromkeys(tuple(c.items()) for group in groups for c in group_candidates(group))
    return tuple(dict(c) for c in found) or (NONE,)


def _print_segments(kernel: KernelContext, loops: Loops) -> None:
    groups, others = matmul_groups(loops.segments)
    for n, group in enumerate(groups):
        if n > 0 and not all(g.few_rows for g in groups):
            kernel.writer.line("worker.barrier();  // the groups share their scratch")
        print_matmuls(kernel, group)
    for segment in others:
        axes = ", ".join(f"{a.symbol} < {print_index(a.extent)}" for a in segment.axes)
        kernel.writer.line(f"// {axes or 'one point'}")
        print_loops(kernel, segment)


def _comment(writer: Writer, op: Op) -> None:
    """Which ops and which parts of the model a kernel came from."""
    work = [o for o in op.body if o.opcode not in ("const", "view", "cast", "dim", "iota")]
    names: dict[str, int] = {}
    for o in work:
        names[o.opcode] = names.get(o.opcode, 0) + 1
    ops = ", ".join(name if count == 1 else f"{name} x{count}" for name, count in names.items())
    writer.line(f"// {op.attr('name')}: {ops or 'copy'}")
    places = dict.fromkeys(
        f"{o.loc.module or 'model'}{f' ({o.loc.source})' if o.loc.source else ''}" for o in work or op.body
    )
    for place in places:
        writer.line(f"//   from {place}")
