"""Programs: what the runtime executes. Plain data, no behaviour of the compiler in it.

A program is a list of *calls*; each call runs a *routine* (a layer, or the ops before and after the layers) on global
*buffers*. N equal layers are N calls of one routine with other buffer numbers, so a program is as long as its distinct
parts. This module is the only one that the runtime imports; it re-exports the element types and errors.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy

from .errors import (
    CacheError,
    CompilerNotFoundError,
    DeviceError,
    InputError,
    KernelBuildError,
    OptionError,
    TilewrightError,
    VerifyError,
)
from .index import sym
from .module import Op
from .reference import run_torch_call
from .types import DType, TensorType, Value, concrete

__all__ = [
    "Buffer", "BufferKind", "CacheError", "Call", "CompilerNotFoundError", "DType", "DeviceError", "InputError",
    "KernelBuildError", "OptionError", "Program", "Routine", "Sizes", "Step", "TensorType", "TilewrightError", "Value",
    "VerifyError", "concrete", "largest_sizes", "physical_shape", "run_torch_call",
]  # fmt: skip

Sizes = Mapping[str, int]
"""Of dims, by their names."""


class BufferKind(enum.Enum):
    """Who owns a buffer's memory."""

    input = "input"  # the caller, this call only
    output = "output"  # the caller, this call only
    param = "param"  # the model; ``name`` is the absolute weight name
    state = "state"  # the request; ``name`` is the absolute slot, of keys, values or a recurrent layer
    arena = "arena"  # the arena, at ``offset``


@dataclass(frozen=True)
class Buffer:
    """A tensor in memory. ``type`` is its logical type; see :func:`physical_shape` for the layout.

    ``offset`` and ``nbytes`` (reserved, at the largest dims) matter for arena buffers only.
    """

    name: str
    kind: BufferKind
    type: TensorType
    offset: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Step:
    """One kernel launch (``kernel``) or PyTorch call (``call_torch``). ``reads`` and ``writes`` number the slots of
    the routine, in the order of the op's operands and results."""

    op: Op
    reads: tuple[int, ...]
    writes: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's name, unique within the program; "" for a PyTorch call."""
        return str(self.op.attr("name", ""))


@dataclass(frozen=True)
class Routine:
    """Steps over formal slots. Slot n of a call stands for the buffer ``call.buffers[n]``."""

    name: str
    slots: tuple[Value, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Call:
    """One run of a routine. ``scope`` is the model module it computes, for reports."""

    routine: int
    buffers: tuple[int, ...]
    scope: str = ""


STEPS = ("decode", "verify")
"""Phases of which a run takes a fixed number of tokens of a fixed number of sequences: one of each, or several of one
sequence, of which all but the first are guesses."""


@dataclass(frozen=True)
class Program:
    """A phase ("decode", "verify", "prefill", "per_request" or "forward") for batches up to ``batch`` rows.

    symbols: name -> inclusive range of each dim that is known at run time only. capacity: the largest T, at which
    KV states and masks are laid out. arena_bytes: size of the arena; nothing else is allocated while running. together:
    the largest sizes of dims that may occur together, where that are not the largest of each.
    """

    name: str
    phase: str
    batch: int
    symbols: tuple[tuple[str, int, int], ...]
    capacity: int
    buffers: tuple[Buffer, ...]
    routines: tuple[Routine, ...]
    calls: tuple[Call, ...]
    arena_bytes: int
    together: tuple[Sizes, ...] = ()

    @property
    def largest(self) -> tuple[Sizes, ...]:
        """Sizes of all dims, in each of which a dim can be no larger without another being smaller."""
        return largest_sizes(self.symbols, self.together)

    @property
    def step_tokens(self) -> int:
        """Tokens of each sequence that a step takes, of all of which it gives logits; 0 for other phases."""
        if self.phase not in STEPS:
            return 0
        ((_, logits), *_) = self.of_kind(BufferKind.output)
        return int(logits.type.shape[1])

    def of_kind(self, kind: BufferKind) -> tuple[tuple[int, Buffer], ...]:
        """(number, buffer) of every buffer of a kind, in order."""
        return tuple((n, b) for n, b in enumerate(self.buffers) if b.kind is kind)

    def trace(self) -> Iterator[tuple[Step, tuple[int, ...], tuple[int, ...]]]:
        """Every step in execution order, with the buffers that it reads and writes."""
        for call in self.calls:
            for step in self.routines[call.routine].steps:
                yield (
                    step,
                    tuple(call.buffers[s] for s in step.reads),
                    tuple(call.buffers[s] for s in step.writes),
                )

    @property
    def state_bytes_per_row(self) -> int:
        """Bytes of a request's state that belong to one sequence."""
        types = (b.type for _, b in self.of_kind(BufferKind.state))
        rows = (TensorType(t.dtype, physical_shape(t, self.capacity)[1:]) for t in types)
        return sum(int(row.nbytes) for row in rows)

    def kernels(self) -> tuple[Step, ...]:
        """Each distinct kernel step once."""
        return tuple(s for r in self.routines for s in r.steps if s.op.opcode == "kernel")

    def __str__(self) -> str:
        return print_program(self)


def largest_sizes(
    symbols: Sequence[tuple[str, int, int]], together: Sequence[Mapping[str, int]] = ()
) -> tuple[Sizes, ...]:
    """The largest sizes of all dims: of those that ``together`` names as it has them, of others their own."""
    highs = {name: high for name, _, high in symbols}
    return tuple(highs | dict(sizes) for sizes in together) or (highs,)


@lru_cache(maxsize=1024)
def physical_shape(type: TensorType, capacity: int) -> tuple[sympy.Expr, ...]:
    """The dims that a buffer is laid out with (row-major): T counts its full capacity, so that a growing context never
    moves what is there; all else is contiguous at the sizes of the call."""
    return tuple(d.xreplace({sym("T"): sympy.Integer(capacity)}) for d in type.shape)


def print_program(program: Program) -> str:
    """The memory plan and the call table, for people."""
    ranges = ", ".join(f"{name} [{low}, {high}]" for name, low, high in program.symbols)
    lines = [
        f"program {program.name} phase {program.phase} batch {program.batch} arena {program.arena_bytes} bytes"
    ]
    lines += [f"symbols {ranges or 'none'}"]
    if program.together:
        sizes = (" ".join(f"{name} {size}" for name, size in t.items()) for t in program.together)
        lines.append(f"together at most {' or '.join(sizes)}")
    lines += ["", "buffers"]
    for n, b in enumerate(program.buffers):
        place = f" @ {b.offset} + {b.nbytes}" if b.kind is BufferKind.arena else ""
        lines.append(f"  {n}: {b.kind.value} {b.name}: {b.type}{place}")
    for n, routine in enumerate(program.routines):
        lines += ["", f"routine {n} {routine.name}"]
        lines += [f"  slot {i}: {v.name}: {v.type}" for i, v in enumerate(routine.slots)]
        for step in routine.steps:
            what = step.name or step.op.attr("target")
            lines.append(f"  {what}({', '.join(map(str, step.reads))}) -> {', '.join(map(str, step.writes))}")
    lines += ["", "calls"]
    for call in program.calls:
        where = f"  # {call.scope}" if call.scope else ""
        lines.append(f"  {program.routines[call.routine].name}({', '.join(map(str, call.buffers))}){where}")
    return "\n".join(lines) + "\n"
