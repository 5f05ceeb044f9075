"""Run kernels through generated C++: all hand-built cases in one library, or one program at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tilewright.codegen.cpp import build
from tilewright.codegen.cpp.build import build_libraries
from tilewright.codegen.cpp.program import print_program
from tilewright.codegen.tunables import Tunables
from tilewright.ir.program import Buffer, BufferKind, Call, Program, Routine, Step, physical_shape
from tilewright.ir.types import Value, concrete
from tilewright.runtime.native import NativeLibrary, pointer_table
from tilewright.runtime.native_executor import NativeExecutor

from .kernel_case import CAPACITY, RANGES, Case
from .triton_cases import CASES

THREADS = 2


def library_of(program: Program, folder: Path, tunables: Tunables | None = None) -> NativeLibrary:
    """A program's library, built in (or taken from) a cache folder."""
    built = build_libraries({program.name: print_program(program, tunables)}, folder)
    return NativeLibrary(built[program.name].path, [name for name, _, _ in program.symbols])


def executor_of(program: Program, weights: Mapping[str, Tensor], folder: Path) -> NativeExecutor:
    return NativeExecutor(program, weights, library_of(program, folder))


def program_of_cases(cases: Mapping[str, Case]) -> Program:
    """One program with a routine of one kernel per case; step n is the n-th case."""
    buffers: list[Buffer] = []
    routines: list[Routine] = []
    calls: list[Call] = []
    for name, case in cases.items():
        op = case.kernel.with_attrs(name=name)
        slots = tuple(dict.fromkeys((*op.operands, *op.results)))
        step = Step(op, tuple(slots.index(v) for v in op.operands), tuple(slots.index(v) for v in op.results))
        routines.append(Routine(name, slots, (step,)))
        first = len(buffers)
        buffers += [Buffer(f"{name}.{v.name}", BufferKind.input, v.type) for v in slots]
        calls.append(Call(len(routines) - 1, tuple(range(first, len(buffers)))))
    symbols = tuple((name, *RANGES[name]) for name in sorted(RANGES))
    return Program("cases", "forward", 0, symbols, CAPACITY, tuple(buffers), tuple(routines), tuple(calls), 0)


@lru_cache(maxsize=4)
def _cases(names: tuple[str, ...]) -> tuple[dict[str, Case], Program]:
    cases = {name: CASES[name]() for name in names}
    return cases, program_of_cases(cases)


ALL = tuple(CASES)


def case_of(name: str, among: tuple[str, ...] = ALL) -> Case:
    """The same case at every call: some draw their data when they are made."""
    return _cases(among)[0][name]


def _buffer(value: Value, content: Tensor | None, dims: Mapping[str, int]) -> Tensor:
    """A tensor laid out as buffers are (T at capacity), filled with ``content`` where it reaches."""
    shape = concrete(physical_shape(value.type, CAPACITY), dims)
    buffer = torch.zeros(shape, dtype=value.dtype.torch)
    if content is not None:
        buffer[tuple(slice(0, n) for n in content.shape)] = content
    return buffer


def run_case(
    name: str,
    folder: Path,
    threads: int = THREADS,
    among: tuple[str, ...] = ALL,
    tunables: Tunables | None = None,
) -> tuple[Tensor, ...]:
    """The results of a case's kernel at their logical shapes. ``among``: the cases to build with it."""
    cases, program = _cases(among)
    changes = tuple((kernel, tuple(fields.items())) for kernel, fields in (tunables or {}).items())
    library = _library_of_cases(among, folder, changes, build.FLAGS)
    return run_one_of(cases, name, program, library, threads)


@lru_cache(maxsize=4)
def _library_of_cases(
    among: tuple[str, ...],
    folder: Path,
    changes: tuple[tuple[str, tuple[tuple[str, int], ...]], ...],
    flags: tuple[str, ...],
) -> NativeLibrary:
    """Printing all cases takes half a second, too long to do for each. ``flags``: those in use, part of the key."""
    return library_of(_cases(among)[1], folder, {kernel: dict(fields) for kernel, fields in changes})


def run_one_of(
    cases: Mapping[str, Case],
    name: str,
    program: Program,
    library: NativeLibrary,
    threads: int,
    inputs: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The results of one kernel of ``program_of_cases(cases)``, of ``inputs`` or else of the case's own."""
    case, number = cases[name], list(cases).index(name)
    dims = dict.fromkeys(RANGES, 1) | case.dims
    inputs, past = inputs or case.inputs(), case.past()
    slots = case.slots
    tensors: dict[Value, Tensor] = {}
    for v in case.kernel.results:
        tensors[v] = _buffer(v, past[slots[v]] if v in slots else None, dims)
    for v in case.kernel.operands:
        tensors[v] = _buffer(v, inputs[v.name], dims)
    addresses = [0] * len(program.buffers)
    for value, buffer in zip(program.routines[number].slots, program.calls[number].buffers, strict=True):
        addresses[buffer] = tensors[value].data_ptr()
    _run(library, addresses, [dims[symbol] for symbol in library.symbols], threads, number)
    return tuple(tensors[v][tuple(slice(0, n) for n in concrete(v.shape, dims))] for v in case.kernel.results)


def _run(
    library: NativeLibrary, addresses: Sequence[int], sizes: Sequence[int], threads: int, step: int
) -> None:
    dims = library.dims(sizes)
    workspace = torch.empty(library.workspace_bytes(dims, threads) + 64, dtype=torch.uint8)
    start = -(-workspace.data_ptr() // 64) * 64
    library.run(pointer_table(addresses), dims, start, threads, first=step, last=step + 1)
