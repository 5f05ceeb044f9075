"""One command that measures a model on a CPU, ours beside other systems: ``python -m benchmarks.cpu``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import build, compile_time, llama_context, machine, memory, models, picture, stored
from benchmarks.build import Built, Plan
from benchmarks.measure import Task, measure
from benchmarks.options import SYSTEMS, command_line, known, lengths
from benchmarks.probe import DEFAULT_BYTES, BandwidthProbe, bandwidth_probe
from benchmarks.results import (
    BATCHED,
    DECODE,
    EAGER,
    FIRST_TOKEN,
    LLAMA_CPP,
    OURS,
    PREFILL,
    CompileTimes,
    Measure,
    MemoryUse,
    Results,
)
from benchmarks.system import LeftOut, System
from benchmarks.tables import tables
from tilewright.cli import readable_errors
from tilewright.progress import Progress

console = Console()
notes = Console(stderr=True)

BATCHED_PRECISION = "bf16"


@readable_errors
def main(
    model: Annotated[
        str, typer.Option(help="smollm2, tiny (random weights), or a Hugging Face folder.")
    ] = "smollm2",
    precisions: Annotated[
        str, typer.Option(help="Any of f32, bf16, int8, int4, separated by commas.")
    ] = "f32,bf16,int8,int4",
    systems: Annotated[
        str, typer.Option(help="Any of tilewright, eager, torch.compile, llama.cpp, separated by commas.")
    ] = ",".join(SYSTEMS),
    contexts: Annotated[str, typer.Option(help="Tokens before the decoding that is timed.")] = "64,1024",
    prefill: Annotated[int, typer.Option(min=2, help="Tokens of the prompt that is timed.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one decoding sample.")] = 32,
    batch: Annotated[
        int,
        typer.Option(min=0, help=f"Sequences of the batched decoding, in {BATCHED_PRECISION}; 0 for none."),
    ] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of every system and the probe.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each system per task.")] = 7,
    compiles: Annotated[int, typer.Option(min=0, help="Compilations in fresh processes; 0 for none.")] = 1,
    backend: Annotated[str | None, typer.Option(help="Ours: cpp or reference; by default cpp.")] = None,
    probe_bytes: Annotated[
        int, typer.Option(min=1 << 20, help="Size of the buffer that the probe reads.")
    ] = DEFAULT_BYTES,
    output: Annotated[
        Path | None, typer.Option(help="Result file instead of one in benchmarks/results.")
    ] = None,
) -> None:
    """Measure MODEL at each precision, run by all systems in turns, and store the samples and a picture of them."""
    torch.set_num_threads(threads)
    chosen = known("--precisions", precisions, tuple(models.PRECISIONS))
    names = [SYSTEMS[name] for name in known("--systems", systems, tuple(SYSTEMS))]
    sizes = lengths("--contexts", contexts)
    facts = machine.describe()
    machine.warn_if_busy(facts, notes)
    plan = Plan(model, names, backend, threads, room=max(*sizes, prefill) + tokens + 1)
    run = _Run(plan, sizes, prefill, tokens, repeats)
    with bandwidth_probe(threads, probe_bytes) as probe:
        for precision in chosen:
            run.side_by_side(precision, probe)
            if batch and precision == BATCHED_PRECISION and OURS in names:
                run.batched(precision, batch, probe)
    compiled = [p for p in chosen if any(m.precision == p and m.of(OURS) for m in run.measures)]
    found = {series.system for m in run.measures for series in m.series}
    results = Results(
        date=stored.now(),
        command=command_line("benchmarks.cpu"),
        model=model,
        machine=facts,
        versions=machine.versions(*(["llama-cpp-python"] if LLAMA_CPP in found else [])),
        settings={"threads": threads} | run.facts,
        measures=tuple(run.measures),
        compile_times=_compile_times(model, compiled, backend, threads, compiles),
        memory=tuple(run.memory),
        left_out=tuple(run.left_out),
    )
    for rows in tables(results):
        console.print(rows.rich())
    file = stored.save(results, output)
    console.print(f"stored in {file}", highlight=False)
    try:
        console.print(f"picture in {picture.draw(results, file.with_suffix('.svg'))}", highlight=False)
    except LeftOut as error:
        notes.print(f"[yellow]no picture[/yellow] {error}", highlight=False)


@dataclass
class _Run:
    """Collects what is measured, one precision after the other: their models do not fit into memory together.

    facts: what the systems say of themselves, for the result file.
    """

    plan: Plan
    contexts: list[int]
    prefill: int
    tokens: int
    repeats: int
    measures: list[Measure] = field(default_factory=list)
    memory: list[MemoryUse] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def side_by_side(self, precision: str, probe: BandwidthProbe) -> None:
        """All systems in turns, and then what their activations take."""
        with build.built(self.plan, precision) as now:
            for reason in now.left_out:
                notes.print(f"[yellow]left out[/yellow] {reason}", highlight=False)
            self.left_out += now.left_out
            self._note(now)
            self._measure(self._tasks(now.source), precision, now.systems, probe)
            if now.fast is not None and EAGER in {s.name for s in now.systems}:
                self.memory.append(_memory(now.fast, now.source, precision, self.prefill))

    def batched(self, precision: str, batch: int, probe: BandwidthProbe) -> None:
        """Ours with several sequences side by side, in turns with one."""
        sides = build.batches(self.plan, precision, (1, batch))
        context = min(self.contexts)
        task = Task(BATCHED, context, self.tokens, models.prompt(sides[0].model, context))
        self._measure([task], precision, sides, probe)

    def _tasks(self, source: Any) -> list[Task]:
        short = min(self.contexts)
        return [
            *(Task(DECODE, size, self.tokens, models.prompt(source, size)) for size in self.contexts),
            Task(PREFILL, self.prefill, self.prefill, models.prompt(source, self.prefill)),
            Task(FIRST_TOKEN, short, 1, models.prompt(source, short)),
        ]

    def _measure(
        self, tasks: list[Task], precision: str, systems: Sequence[System], probe: BandwidthProbe
    ) -> None:
        """The tasks that at least one of the systems is measured in."""
        able = {task: [s for s in systems if task.name in s.tasks] for task in tasks}
        able = {task: found for task, found in able.items() if found}
        total = sum(self.repeats + len(found) for found in able.values())
        with Progress().step(f"Measuring {precision}", total=total) as advance:
            for task, found in able.items():
                for system in found:
                    advance(f"{task}, {system.name} warms up")
                    task.run(system)
                self.measures.append(measure(task, precision, found, probe, self.repeats, advance))

    def _note(self, now: Built) -> None:
        if now.fast is not None:
            report = now.fast.report()
            self.facts |= {"backend": report.backend, "kernels_per_layer": report.kernels_per_layer}
        if any(s.name == LLAMA_CPP for s in now.systems) and "llama_cpp" not in self.facts:
            self.facts["llama_cpp"] = info = llama_context.system_info()
            if unused := llama_context.unused_extensions(info, machine.describe()["extensions"]):
                notes.print(
                    f"[yellow]llama.cpp was built without {', '.join(unused)}[/yellow], which this machine has; for a "
                    f"fair comparison run: {llama_context.INSTALL} --force-reinstall --no-cache-dir",
                    highlight=False,
                )


def _memory(fast: Any, source: Any, precision: str, prefill: int) -> MemoryUse:
    ids = models.prompt(source, prefill)
    return MemoryUse(
        precision=precision,
        prompt=prefill,
        arena_bytes=fast.report().phase("prefill").arena_bytes,
        our_peak_bytes=memory.our_peak(fast, ids),
        eager_peak_bytes=memory.eager_peak(source, ids),
        allocations_per_step=memory.allocations_per_step(fast, ids),
    )


def _compile_times(
    model: str, precisions: list[str], backend: str | None, threads: int, repeats: int
) -> tuple[CompileTimes, ...]:
    if not repeats:
        return ()
    with Progress().step("Compiling in fresh processes", total=len(precisions)) as advance:
        times = []
        for precision in precisions:
            advance(precision)
            times.append(compile_time.measure(model, precision, backend, threads, repeats))
    return tuple(times)


def run() -> None:
    """The command line."""
    typer.run(main)


if __name__ == "__main__":
    run()
