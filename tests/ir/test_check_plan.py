"""The checker of memory plans against a byte-by-byte replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import examples
from tilewright.ir.check_plan import check_plan
from tilewright.ir.errors import VerifyError
from tilewright.ir.module import Op
from tilewright.ir.parser import parse_module
from tilewright.ir.program import Buffer, BufferKind, Call, Program, Routine, Step
from tilewright.ir.types import Value, tensor_type

TYPE = tensor_type("f32", [4])
SIZE = 16


def _kernel(name: str, operands: str, results: str, body: str) -> Op:
    params = ", ".join(f"{v}: f32[4]" for v in operands.split(", "))
    types = "f32[4]" if "," not in results else "(f32[4], f32[4])"
    text = f'func @main({params}) -> () {{ {results} = kernel {operands} {{name = "{name}"}} [ {body} ] : {types} }}'
    return parse_module(text).main.ops[0]


FLIP = "view %a {map = (i0) -> (3 - i0)} : f32[4]"
KERNELS = {
    "neg": _kernel("neg", "%a", "%y", "%y = neg %a : f32[4]"),
    "add": _kernel("add", "%a, %b", "%y", "%y = add %a, %b : f32[4]"),
    "flip": _kernel("flip", "%a", "%y", f"%y = {FLIP}"),
    "flip_add": _kernel("flip_add", "%a, %b", "%y", f"%f = {FLIP} %y = add %f, %b : f32[4]"),
    "both": _kernel("both", "%a", "%y, %z", "%y = neg %a : f32[4] %z = exp %a : f32[4]"),
    "mixed": _kernel("mixed", "%a", "%y, %z", f"%y = neg %a : f32[4] %z = {FLIP}"),
}
IN_PLACE = {("neg", 0, 0), ("add", 0, 0), ("add", 1, 0), ("flip_add", 1, 0), ("both", 0, 0), ("both", 0, 1)}
"""(kernel, operand, result): pairs that may share memory, by looking at them."""


def program(buffers: list[Buffer], routines: list[Routine], calls: list[Call], arena: int) -> Program:
    return Program("p", "forward", 1, (), 16, tuple(buffers), tuple(routines), tuple(calls), arena)


def test_a_buffer_has_room_for_its_value_at_every_size() -> None:
    """One that is planned for the least size, or for one of two that occur."""
    rows = parse_module(
        "func @main(%x: f32[B, S]) -> () { %y = kernel %x [ %y = neg %x : f32[B, S] ] : f32[B, S] }"
    )
    op = rows.main.ops[0]
    for room, together in ((4 * 64 * 8, ()), (4 * 64, ({"B": 8, "S": 8}, {"B": 64, "S": 1}))):
        for size in (room, room - 1):
            buffers = (
                Buffer("x", BufferKind.input, op.operands[0].type),
                Buffer("y", BufferKind.arena, op.result.type, 0, size),
            )
            routine = Routine("r", (op.operands[0], op.result), (Step(op, (0,), (1,)),))
            symbols = (("B", 1, 64), ("S", 1, 8))
            made = Program(
                "p", "forward", 1, symbols, 16, buffers, (routine,), (Call(0, (0, 1)),), room, together
            )
            if size == room:
                check_plan(made)
            else:
                with pytest.raises(VerifyError, match=r"buffer 1 \(y\) has no room for its largest value"):
                    check_plan(made)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """One to four calls of two routines with random buffers at random places; most plans of this kind are wrong."""
    places = draw(st.sampled_from([(0, 16, 32, 48, 64), (0, 8, 16, 24, 40), tuple(range(0, 160, 16))]))
    count = draw(st.integers(3, 7))
    buffers = [Buffer("x", BufferKind.input, TYPE)]
    spread = draw(st.booleans())
    for n in range(1, count):
        offset = places[n % len(places)] if spread else draw(st.sampled_from(places))
        buffers.append(Buffer(f"b{n}", BufferKind.arena, TYPE, offset, SIZE))
    routines = []
    for n in range(2):
        steps, slots = [], 0
        for name in draw(st.lists(st.sampled_from(sorted(KERNELS)), min_size=1, max_size=3)):
            op = KERNELS[name]
            reads = tuple(draw(st.integers(0, slots)) for _ in op.operands)
            writes = tuple(range(slots + 1, slots + 1 + len(op.results)))
            slots += len(op.results)
            steps.append(Step(op, reads, writes))
        values = tuple(Value(f"s{i}", TYPE) for i in range(slots + 1))
        routines.append(Routine(f"r{n}", values, tuple(steps)))
    calls, known = [], [0]
    for _ in range(draw(st.integers(1, 4))):
        r = draw(st.integers(0, 1))
        first = draw(st.sampled_from(known))
        rest = [draw(st.integers(1, count - 1)) for _ in routines[r].slots[1:]]
        known += rest
        calls.append(Call(r, (first, *rest)))
    return program(buffers, routines, calls, 160 + SIZE)


def is_right(plan: Program) -> bool:
    """Replay with one tag per byte: the buffer that wrote it last. A kernel stores element by element, so within a
    step a result may lie exactly on an operand that each iteration reads at its own place, and nowhere else."""
    tags: list[int | None] = [None] * (plan.arena_bytes + SIZE)

    def span(n: int) -> range:
        b = plan.buffers[n]
        return range(b.offset, b.offset + b.nbytes) if b.kind is BufferKind.arena else range(0)

    for step, reads, writes in plan.trace():
        for n in reads:
            if any(tags[byte] != n for byte in span(n)):
                return False
        for j, w in enumerate(writes):
            if any(other == w or set(span(other)) & set(span(w)) for other in writes[j + 1 :]):
                return False
            for i, r in enumerate(reads):
                shared = set(span(r)) & set(span(w))
                if shared and not (span(r) == span(w) and (step.name, i, j) in IN_PLACE):
                    return False
        for w in writes:
            for byte in span(w):
                tags[byte] = w
    return True


def passes(plan: Program) -> bool:
    try:
        check_plan(plan)
    except VerifyError:
        return False
    return True


@examples(400)
@given(programs())
def test_checker_agrees_with_a_byte_by_byte_replay(plan: Program) -> None:
    """The one guard against silent corruption of activations would let a bad plan through, or refuse a good one."""
    assert passes(plan) == is_right(plan)


def chain(*offsets: int, kernel: str = "flip") -> Program:
    """x -> b1 -> b2 -> ... by one kernel each."""
    buffers = [Buffer("x", BufferKind.input, TYPE)]
    buffers += [Buffer(f"b{n}", BufferKind.arena, TYPE, o, SIZE) for n, o in enumerate(offsets, start=1)]
    steps = tuple(Step(KERNELS[kernel], (n,), (n + 1,)) for n in range(len(offsets)))
    values = tuple(Value(f"s{n}", TYPE) for n in range(len(buffers)))
    return program(buffers, [Routine("r", values, steps)], [Call(0, tuple(range(len(buffers))))], 64)


def test_a_ping_pong_is_right() -> None:
    """Reuse of dead memory would be refused, and the arena would hold every value at once."""
    check_plan(chain(0, 16, 0, 16))


@pytest.mark.parametrize(
    ("offsets", "kernel", "message"),
    [
        ((0, 0), "flip", r"flip overwrites buffer 1 \(b1\) while it is being read"),
        ((0, 8), "neg", r"neg overwrites buffer 1 \(b1\) while it is being read"),
        ((0, 60), "neg", r"buffer 2 \(b2\) lies outside the arena"),
        ((-4, 16), "neg", r"buffer 1 \(b1\) lies outside the arena"),
    ],
)
def test_messages_say_which_buffer(offsets: tuple[int, ...], kernel: str, message: str) -> None:
    """A broken plan could not be traced to its buffers."""
    with pytest.raises(VerifyError, match=message):
        check_plan(chain(*offsets, kernel=kernel))


def test_reading_what_was_overwritten_or_never_written() -> None:
    """The replay would only look at neighbours in time."""
    good = chain(0, 16, 32)
    late = Step(KERNELS["add"], (1, 3), (4,))
    routine = good.routines[0]
    values = (*routine.slots, Value("s4", TYPE))
    buffers = (*good.buffers, Buffer("b4", BufferKind.arena, TYPE, 48, SIZE))
    plan = replace(
        good,
        buffers=buffers,
        routines=(replace(routine, slots=values, steps=(*routine.steps, late)),),
        calls=(Call(0, tuple(range(5))),),
    )
    check_plan(plan)
    clash = replace(plan, buffers=(*buffers[:3], replace(buffers[3], offset=8), buffers[4]))
    with pytest.raises(VerifyError, match=r"buffer 1 \(b1\), which is not intact|while it is being read"):
        check_plan(clash)
    unwritten = replace(plan, calls=(Call(0, (4, 1, 2, 3, 4)),))
    with pytest.raises(VerifyError, match=r"reads buffer 4 \(b4\), which is not intact"):
        check_plan(unwritten)


def test_text_of_a_plan_names_every_buffer() -> None:
    """The dump would hide what the arena holds."""
    text = str(chain(0, 16))
    assert "1: arena b1: f32[4] @ 0 + 16" in text
    assert "flip(1) -> 2" in text
    assert "r(0, 1, 2)" in text
