"""A kernel's segments, each with the template that prints it and the work that it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sympy import Expr

from tilewright.ir.errors import VerifyError
from tilewright.ir.loops import AttentionForm, Axis, Segment, attention_form, scalarize, sole_op
from tilewright.ir.module import Op
from tilewright.ir.recurrent import RECURRENT

from .attention import emit_attention
from .experts_order import emit_experts_order
from .expression import Context
from .generic import emit_generic
from .grouped import emit_grouped
from .matmul import emit_matmul
from .pointwise import emit_pointwise
from .product import find_product
from .recurrent import emit_recurrent
from .reduction import emit_reduction, row_axes, row_symbols, sharers
from .row_loops import Stage, plan_stages
from .tiling import Tile
from .work import (
    Sizes,
    StreamWork,
    Work,
    attention_work,
    grouped_work,
    order_work,
    product_work,
    recurrent_work,
    stream_work,
)


@dataclass(frozen=True)
class Plan:
    """A segment (None for a primitive), its template, and ``emit(tile, context, interpret)``, which prints it into
    ``context.base`` and gives the number of programs."""

    template: str
    work: Work
    segment: Segment | None
    emit: Callable[[Tile, Context, bool], Expr]


def plan_parts(op: Op, sizes: Sizes) -> tuple[Plan, ...]:
    """The segments of a ``kernel`` op. Raises VerifyError when it has no loop form."""
    form = attention_form(op)
    if form is not None:
        return (_attention(form, sizes),)
    sole = sole_op(op)
    if sole is not None:
        return (_recurrent(sole, sizes) if sole.opcode in RECURRENT else _experts(sole, sizes),)
    return tuple(_segment(segment, sizes) for segment in scalarize(op).segments)


def _attention(form: AttentionForm, sizes: Sizes) -> Plan:
    def emit(tile: Tile, context: Context, interpret: bool) -> Expr:
        return emit_attention(form, tile, context, "pid", interpret)

    return Plan("attention", attention_work(form, sizes), None, emit)


def _recurrent(op: Op, sizes: Sizes) -> Plan:
    def emit(tile: Tile, context: Context, interpret: bool) -> Expr:
        return emit_recurrent(op, tile, context, "pid")

    return Plan("recurrent", recurrent_work(op, sizes), None, emit)


def _experts(op: Op, sizes: Sizes) -> Plan:
    match op.opcode:
        case "experts_order":
            work = order_work(op, sizes)
            return Plan(op.opcode, work, None, lambda t, c, i: emit_experts_order(op, t, c, "pid"))
        case "grouped_matmul":
            return Plan(
                op.opcode, grouped_work(op, sizes), None, lambda t, c, i: emit_grouped(op, t, c, "pid", i)
            )
    raise VerifyError(f"{op.opcode} has no Triton form: see the pass spell_out_experts")


def _segment(segment: Segment, sizes: Sizes) -> Plan:
    product = find_product(segment)
    if product is not None:
        work = product_work(product, segment, sizes)
        return Plan("matmul", work, segment, lambda t, c, i: emit_matmul(product, segment, t, c, "pid", i))
    stream, stages = stream_work(segment, sizes), plan_stages(segment, row_symbols(segment))
    if stages:
        rows = _reduction_work(stream, row_axes(segment), stages, sizes)
        return Plan("reduction", rows, segment, lambda t, c, i: emit_reduction(segment, stages, t, c, "pid"))
    if stages is None:
        # Its reductions are loops around blocks of points: blocks are those of a pointwise kernel.
        return Plan("generic", stream.pointwise, segment, lambda t, c, i: emit_generic(segment, t, c, "pid"))
    return Plan("pointwise", stream, segment, lambda t, c, i: emit_pointwise(segment, t, c, "pid"))


def _reduction_work(
    stream: StreamWork, rows: tuple[Axis, ...], stages: tuple[Stage, ...], sizes: Sizes
) -> StreamWork:
    """A stream as the rows of a reduction, with what neighbours share."""
    shared = {stage: sharers(rows, stage.reduces) for stage in stages}
    most = max(shared.values())
    own = (sizes.of(stage.extent) for stage, count in shared.items() if count < most)
    points = sizes.of(*(a.extent for a in rows))
    return replace(stream, points=points, sharers=most, own=max(own, default=0))
