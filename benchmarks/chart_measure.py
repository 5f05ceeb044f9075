"""Measures one point of the chart, whatever its systems do: those that fail are left out, and those that do not fit
into memory side by side are measured one after the other."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console

from benchmarks import memory
from benchmarks.measure import Task, measure
from benchmarks.results import DECODE, Measure
from benchmarks.system import System
from benchmarks.time_limit import TimeUpError, limited
from tilewright.progress import Advance
from tilewright.runtime.device import is_out_of_memory

OUT_OF_MEMORY = "out of memory"
notes = Console(stderr=True)


@dataclass(frozen=True)
class Measured:
    """A task of several systems. peak_bytes and left_out (the reason) are by system."""

    measure: Measure | None
    peak_bytes: dict[str, int]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Conditions:
    """How to measure. limit: seconds that a system may take to get ready. probe: read bandwidth in bytes/s."""

    device: torch.device
    repeats: int
    limit: float
    probe: Callable[[], float]
    advance: Advance


def measured(task: Task, systems: Sequence[System], how: Conditions) -> Measured:
    """Samples of every system that can take part, and the memory that each takes by itself."""
    able, reasons = _ready(task, systems, how)
    peaks: dict[str, int] = {}
    released(systems, how.device, thoroughly=True)
    found = _in_turns(task, able, how, peaks) if able else None
    if able and found is None:
        peaks.clear()
        found = _one_by_one(task, able, how, reasons, peaks)
    released(systems, how.device)
    return Measured(found, peaks, reasons)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that were allocated while ``run`` ran, above what was allocated before."""
    if device.type != "cuda":
        return memory.peak(memory.allocation_events(run))
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def released(systems: Sequence[System], device: torch.device, thoroughly: bool = False) -> None:
    """Have every system let go of its contexts. thoroughly: also what cycles of objects hold, as tracebacks do."""
    if thoroughly:
        for system in systems:
            system.release()
        gc.collect()  # which gives requests of ours back to their model
    for system in systems:
        system.release()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def reason_of_failure(name: str, limit: float, reasons: dict[str, str]) -> Iterator[None]:
    """Run the block with a time limit; if it fails, keep the reason as ``reasons[name]``, and go on behind it."""
    try:
        with limited(limit):
            yield
    except TimeUpError as error:
        reasons[name] = str(error)
    except Exception as error:  # noqa: BLE001 - a rival's compiler may raise anything; the others are measured all the same
        reasons[name] = _said(error)
    if name in reasons:
        notes.print(f"[yellow]left out[/yellow] {name}: {reasons[name]}", highlight=False)


def _said(error: BaseException) -> str:
    """One line of an error."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0][:200]}"


def _ready(task: Task, systems: Sequence[System], how: Conditions) -> tuple[list[System], dict[str, str]]:
    """The systems that ran once, each with the device to itself, which is when they compile."""
    reasons: dict[str, str] = {}
    for system in systems:
        how.advance(f"{task}, {system.name} gets ready")
        with reason_of_failure(system.name, how.limit, reasons):
            task.run(system)
        released(systems, how.device)
    return [s for s in systems if s.name not in reasons], reasons


def _in_turns(
    task: Task, systems: Sequence[System], how: Conditions, peaks: dict[str, int]
) -> Measure | None:
    """None where that fails, as it does where the contexts of all do not fit into memory."""
    try:
        for system in systems:
            with limited(how.limit):
                peaks[system.name] = _warm(task, system, how)
        return measure(task, "bf16", systems, how.probe, how.repeats, how.advance)
    except (Exception, TimeUpError) as error:  # noqa: BLE001 - whose it is shows when each runs alone
        notes.print(f"[yellow]one after the other[/yellow] {task}: {_said(error)}", highlight=False)
        return None


def _one_by_one(
    task: Task, systems: Sequence[System], how: Conditions, reasons: dict[str, str], peaks: dict[str, int]
) -> Measure | None:
    """All samples of one system, then all of the next. A round's probe is the median of those beside its samples."""
    alone: list[Measure] = []
    for system in systems:
        released(systems, how.device, thoroughly=True)
        with reason_of_failure(system.name, how.limit, reasons):
            peaks[system.name] = _warm(task, system, how)
            alone.append(measure(task, "bf16", [system], how.probe, how.repeats, how.advance))
    if not alone:
        return None
    probe = tuple(statistics.median(rates) for rates in zip(*(m.probe for m in alone), strict=True))
    return replace(alone[0], probe=probe, series=tuple(s for m in alone for s in m.series))


def _warm(task: Task, system: System, how: Conditions) -> int:
    """The peak bytes of a run that leaves the system as samples find it: with its context, and with what it records of
    steps on that.

    A decode is many steps, so one is enough. Of a forward there are two, since compilers that record what they launch
    do so at the second time; the first was when the system got ready, but for a context that is gone.
    """
    how.advance(f"{task}, {system.name} warms up")
    peak = peak_bytes(partial(task.run, system), how.device)
    if task.name != DECODE:
        task.run(system)
    return peak
