"""One command that measures a model beside Hugging Face eager on a CPU: ``python -m benchmarks.cpu``."""

from __future__ import annotations

import datetime
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import tilewright as tw
from benchmarks import compile_time, machine, memory, models
from benchmarks.probe import DEFAULT_BYTES, BandwidthProbe, bandwidth_probe
from benchmarks.results import CompileTimes, Measure, MemoryUse, Results
from benchmarks.subject import Subject
from benchmarks.tables import tables
from tilewright.cli import readable_errors
from tilewright.errors import OptionError
from tilewright.progress import Advance, Progress

console = Console()
notes = Console(stderr=True)

SETTLE = 0.05
"""Seconds of rest before each sample: threads of the side that ran before stop spinning."""

BUSY = 0.5
"""Load per core before a run above which its figures are in doubt."""


@dataclass(frozen=True)
class Task:
    """What both sides do for one sample: ``run`` gives the seconds for ``tokens`` tokens."""

    name: str
    size: int
    tokens: int
    run: Callable[[Subject], float]
    bytes_per_token: int = 0


@readable_errors
def main(
    model: Annotated[
        str, typer.Option(help="smollm2, tiny (random weights), or a Hugging Face folder.")
    ] = "smollm2",
    dtypes: Annotated[str, typer.Option(help="Any of f32, bf16, separated by commas.")] = "f32,bf16",
    contexts: Annotated[str, typer.Option(help="Tokens before the decoding that is timed.")] = "64,1024",
    prefill: Annotated[int, typer.Option(min=2, help="Tokens of the prompt that is timed.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one decoding sample.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of both sides and the probe.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each side per task.")] = 7,
    compiles: Annotated[int, typer.Option(min=0, help="Compilations in fresh processes; 0 for none.")] = 3,
    backend: Annotated[str | None, typer.Option(help="cpp or reference; by default cpp.")] = None,
    probe_bytes: Annotated[
        int, typer.Option(min=1 << 20, help="Size of the buffer that the probe reads.")
    ] = DEFAULT_BYTES,
    output: Annotated[
        Path | None, typer.Option(help="Result file instead of one in benchmarks/results.")
    ] = None,
) -> None:
    """Measure MODEL, ours and Hugging Face eager in turns, and store the samples."""
    torch.set_num_threads(threads)
    chosen = _known_dtypes(dtypes)
    lengths = _lengths(contexts)
    facts = machine.describe()
    if facts["load"] > BUSY * facts["cores"]:
        notes.print(
            f"[yellow]busy machine[/yellow]: load {facts['load']} on {facts['cores']} cores; threads that wait for "
            "each other suffer most from that, so neither rates nor ratios will be those of a quiet one",
            highlight=False,
        )
    measures: list[Measure] = []
    used: list[MemoryUse] = []
    with bandwidth_probe(threads, probe_bytes) as probe:
        for dtype in chosen:
            source, fast = _both(model, dtype, backend)
            tasks = list(_tasks(source, lengths, prefill, tokens))
            with Progress().step(f"Measuring {dtype}", total=len(tasks) * (repeats + 1) + 1) as advance:
                sides = Subject(fast), Subject(source)
                measures += [measure(task, dtype, *sides, probe, repeats, advance) for task in tasks]
                advance("memory")
                used.append(_memory(fast, source, dtype, prefill))
    results = Results(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=_command(),
        model=type(source).__name__ if model == "tiny" else model,
        machine=facts,
        versions=machine.versions(),
        settings={
            "threads": threads,
            "batch": 1,
            "backend": fast.report().backend,
            "kernels_per_layer": fast.report().kernels_per_layer,
        },
        measures=tuple(measures),
        compile_times=_compile_times(model, chosen, backend, threads, compiles),
        memory=tuple(used),
    )
    for table in tables(results):
        console.print(table)
    console.print(f"stored in {results.save(output)}", highlight=False)


def measure(
    task: Task,
    dtype: str,
    ours: Subject,
    theirs: Subject,
    probe: BandwidthProbe,
    repeats: int,
    advance: Advance,
) -> Measure:
    """Samples of a task, ours, Hugging Face's and the probe's in turns, after one untimed run of each side.

    Which side begins changes from pair to pair, so that a steady drift of the machine favours neither.
    """
    advance(f"{task.name} {task.size}, warm-up")
    for side in (ours, theirs):
        task.run(side)
    samples: dict[Subject, list[float]] = {ours: [], theirs: []}
    bandwidth = []
    for n in range(repeats):
        advance(f"{task.name} {task.size}")
        for side in (ours, theirs) if n % 2 == 0 else (theirs, ours):
            time.sleep(SETTLE)
            samples[side].append(task.run(side))
        time.sleep(SETTLE)
        bandwidth.append(probe())
    return Measure(
        task.name,
        dtype,
        task.size,
        task.tokens,
        tuple(samples[ours]),
        tuple(samples[theirs]),
        tuple(bandwidth),
        task.bytes_per_token,
    )


def _both(model: str, dtype: str, backend: str | None) -> tuple[Any, Any]:
    source = models.load(model, dtype, Progress())
    return source, tw.compile(source, backend=backend, progress=Progress())


def _tasks(source: Any, contexts: list[int], prefill: int, tokens: int) -> Iterator[Task]:
    for context in contexts:
        ids = models.prompt(source, context)
        # The context grows while a sample runs; its middle says how many keys and values were read per token.
        read = models.bytes_per_token(source, context + tokens // 2)
        yield Task("decode", context, tokens, partial(Subject.decode, ids=ids, tokens=tokens), read)
    prompt = models.prompt(source, prefill)
    yield Task("prefill", prefill, prefill, partial(Subject.prefill, ids=prompt))
    for length in sorted({min(contexts), prefill}):
        ids = models.prompt(source, length)
        yield Task("first token", length, 1, partial(Subject.first_token, ids=ids))


def _memory(fast: Any, source: Any, dtype: str, prefill: int) -> MemoryUse:
    ids = models.prompt(source, prefill)
    return MemoryUse(
        dtype=dtype,
        prompt=prefill,
        arena_bytes=fast.report().phase("prefill").arena_bytes,
        our_peak_bytes=memory.our_peak(fast, ids),
        eager_peak_bytes=memory.eager_peak(source, ids),
        allocations_per_step=memory.allocations_per_step(fast, ids),
    )


def _compile_times(
    model: str, dtypes: list[str], backend: str | None, threads: int, repeats: int
) -> tuple[CompileTimes, ...]:
    if not repeats:
        return ()
    with Progress().step("Compiling in fresh processes", total=len(dtypes)) as advance:
        times = []
        for dtype in dtypes:
            advance(dtype)
            times.append(compile_time.measure(model, dtype, backend, threads, repeats))
    return tuple(times)


def _known_dtypes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in models.DTYPES]
    if unknown:
        raise OptionError(f"--dtypes: '{unknown[0]}' is none of {', '.join(models.DTYPES)}")
    return names


def _lengths(text: str) -> list[int]:
    names = [name.strip() for name in text.split(",")]
    if not all(name.isdecimal() and int(name) > 1 for name in names):
        raise OptionError(
            f"--contexts: '{text}' is no list of lengths of 2 or more; write for example 64,1024"
        )
    return [int(name) for name in names]


def _command() -> str:
    return shlex.join(["python", "-m", "benchmarks.cpu", *sys.argv[1:]])


def run() -> None:
    """The command line."""
    typer.run(main)


if __name__ == "__main__":
    run()
