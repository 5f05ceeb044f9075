"""Builds the systems that are compared at one precision."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import gguf_files, models
from benchmarks.llama_system import KV_ITEMSIZE, LlamaCpp
from benchmarks.models import PRECISIONS
from benchmarks.results import EAGER, LLAMA_CPP, OURS, TORCH_COMPILE
from benchmarks.subject import Subject
from benchmarks.system import LeftOut, System
from benchmarks.torch_compile import TorchCompile
from tilewright.costs import program_cost
from tilewright.errors import TilewrightError
from tilewright.progress import Progress


@dataclass(frozen=True)
class Plan:
    """What to build. model: a name of ``models.load``. systems: names of ``results.SYSTEMS``. room: positions that a
    KV state has to hold."""

    model: str
    systems: Sequence[str]
    backend: str | None
    threads: int
    room: int


@dataclass(frozen=True)
class Built:
    """The systems of one precision, ready to run. ``source`` is the Hugging Face model they were made from, ``fast``
    the same compiled by tilewright, where that is among them; ``left_out`` says what is missing and why."""

    source: Any
    fast: Any
    systems: tuple[System, ...]
    left_out: tuple[str, ...]


@contextmanager
def built(plan: Plan, precision: str) -> Iterator[Built]:
    """Every system of the plan that knows the precision; they are freed at the end of the block."""
    source = models.load(plan.model, precision, Progress())
    systems: list[System] = []
    left_out: list[str] = []
    try:
        for name in plan.systems:
            if name in (EAGER, TORCH_COMPILE) and PRECISIONS[precision].weights is not None:
                continue  # there is no such model to run
            try:
                systems.append(_build(plan, name, precision, source))
            except (LeftOut, TilewrightError) as error:
                left_out.append(f"{name}, {precision}: {error}")
        ours = next((s for s in systems if isinstance(s, Subject) and s.name == OURS), None)
        yield Built(source, ours and ours.model, tuple(systems), tuple(left_out))
    finally:
        for system in systems:
            system.close()
        del source, systems
        gc.collect()  # modules are full of cycles, and the next precision needs the room


def batches(plan: Plan, precision: str, sizes: tuple[int, ...]) -> tuple[Subject, ...]:
    """tilewright with programs for several batch sizes, as one system per size.

    A model of its own: programs for a batch make the arena larger, which the figures at batch 1 are not to show.
    """
    source = models.load(plan.model, precision, Progress())
    options: dict[str, Any] = {"backend": plan.backend, "batch_sizes": sizes, "progress": Progress()}
    fast = models.compiled(source, precision, **options)
    return tuple(Subject(OURS, fast, partial(our_bytes, fast, source, precision, n), n) for n in sizes)


def _build(plan: Plan, name: str, precision: str, source: Any) -> System:
    if name == OURS:
        fast = models.compiled(source, precision, backend=plan.backend, progress=Progress())
        return Subject(OURS, fast, partial(our_bytes, fast, source, precision, 1))
    if name == EAGER:
        return Subject(EAGER, source, partial(models.bytes_per_step, source))
    if name == TORCH_COMPILE:
        return TorchCompile(source)
    assert name == LLAMA_CPP
    if plan.model != "smollm2":
        raise LeftOut("there is a GGUF file for smollm2 only")
    file = gguf_files.requantised(PRECISIONS[precision].gguf, plan.threads, Progress())
    return LlamaCpp(file, plan.threads, plan.room, models.kv_bytes(source, KV_ITEMSIZE))


def our_bytes(fast: Any, source: Any, precision: str, batch: int, context: int) -> int:
    """Bytes of a decode step of ours, per batch.

    At the model's own dtype they follow from the model, as for every other system that runs it. What quantised weights
    and their scales take is only known to the program: it counts every operand of every kernel, which for bf16 comes
    out 0.3 % above the former.
    """
    if PRECISIONS[precision].weights is None:
        return models.bytes_per_step(source, context, batch)
    program = fast._tilewright.engine.decode_executors[batch].program
    return program_cost(program, {"B": batch, "S": 1, "L": 1, "T": context}).bytes
