"""The independent checker of memory plans: it replays a program and watches every byte range.

It shares no lifetimes and no interference graph with the planner, only the definition of which operand an elementwise
kernel may overwrite (``loops.elementwise_inputs``, whose claim its own tests check by running in place). A buffer is
*intact* from the step that writes it until another buffer that overlaps it is written; reading one that is not intact
is an error.
"""

from __future__ import annotations

import math

from .errors import VerifyError
from .loops import PRIMITIVES, elementwise_inputs, scalarize
from .program import Buffer, BufferKind, Program, Step, physical_shape
from .types import concrete


def check_plan(program: Program) -> None:
    """Raise VerifyError at the first step that reads clobbered memory, aliases unsafely, or leaves the arena."""
    arena = dict(program.of_kind(BufferKind.arena))
    for number, buffer in arena.items():
        if buffer.offset < 0 or buffer.offset + buffer.nbytes > program.arena_bytes:
            raise VerifyError(f"{program.name}: buffer {number} ({buffer.name}) lies outside the arena")
        if buffer.nbytes < _most_bytes(buffer, program):
            raise VerifyError(
                f"{program.name}: buffer {number} ({buffer.name}) has no room for its largest value"
            )
    overlaps = {
        n: [m for m, other in arena.items() if m != n and _overlap(buffer, other)]
        for n, buffer in arena.items()
    }
    intact: set[int] = set()
    for step, reads, writes in program.trace():
        where = f"{program.name}: {step.name or step.op.attr('target')}"
        for n in reads:
            if n in arena and n not in intact:
                raise VerifyError(f"{where} reads buffer {n} ({arena[n].name}), which is not intact")
        _check_aliases(step, reads, writes, arena, where)
        for n in writes:
            intact -= set(overlaps.get(n, ()))
        intact |= {n for n in writes if n in arena}


def _most_bytes(buffer: Buffer, program: Program) -> int:
    shape, item = physical_shape(buffer.type, program.capacity), buffer.type.dtype.itemsize
    return max(item * math.prod(concrete(shape, sizes)) for sizes in program.largest)


def _overlap(a: Buffer, b: Buffer) -> bool:
    return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


def _check_aliases(
    step: Step, reads: tuple[int, ...], writes: tuple[int, ...], arena: dict[int, Buffer], where: str
) -> None:
    """Within a step, outputs are disjoint from each other, and from inputs unless elementwise and equally placed."""
    for position, w in enumerate(writes):
        for other in writes[position + 1 :]:
            if w == other or (w in arena and other in arena and _overlap(arena[w], arena[other])):
                raise VerifyError(f"{where} writes buffers {w} and {other}, which overlap")
        for at, r in enumerate(reads):
            if r not in arena or w not in arena or not (r == w or _overlap(arena[r], arena[w])):
                continue
            same_place = arena[r].offset == arena[w].offset
            pair = (step.op.operands[at], step.op.results[position])
            if not (same_place and step.op.opcode == "kernel" and _elementwise(step, pair)):
                raise VerifyError(f"{where} overwrites buffer {r} ({arena[r].name}) while it is being read")


def _elementwise(step: Step, pair: tuple[object, object]) -> bool:
    primitive = any(op.opcode in PRIMITIVES for op in step.op.body)
    return not primitive and pair in elementwise_inputs(scalarize(step.op))
