"""Times each kernel of a program against what it has to read and write: ``python -m benchmarks.kernels``.

Every kernel runs where it stands in the program, after the one before it, so that weights come from memory and
activations from cache as in a real step. ``--clock cpu`` with one thread counts processor time, which a busy machine
disturbs less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import models
from benchmarks.probe import bandwidth_probe
from tilewright.cli import readable_errors
from tilewright.costs import Cost, step_cost
from tilewright.ir.program import Step
from tilewright.progress import Progress
from tilewright.runtime.native_executor import NativeExecutor

console = Console()


class Clock(StrEnum):
    """What counts as time: that of the wall, or what the processor spent on this process."""

    wall = "wall"
    cpu = "cpu"

    @property
    def now(self) -> Callable[[], float]:
        return {"wall": time.perf_counter, "cpu": time.process_time}[self.value]


class Phase(StrEnum):
    """The program to take apart."""

    decode = "decode"
    prefill = "prefill"


@dataclass(frozen=True)
class KernelTime:
    """One distinct kernel: the module it computes, seconds of each run in a step, and what a run costs at least."""

    name: str
    module: str
    seconds: tuple[float, ...]
    cost: Cost

    @property
    def typical(self) -> float:
        return statistics.median(self.seconds)


@readable_errors
def main(
    model: Annotated[str, typer.Option(help="smollm2, tiny, or a Hugging Face folder.")] = "smollm2",
    precision: Annotated[str, typer.Option(help="f32, bf16, int8 or int4.")] = "f32",
    phase: Annotated[Phase, typer.Option(help="The program to take apart.")] = Phase.decode,
    size: Annotated[
        int, typer.Option(min=2, help="Context of a decode step, or tokens of a prompt (512 at most).")
    ] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences side by side.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, ours and the probe's.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Steps to time; the best run of a kernel counts.")] = 9,
    clock: Annotated[Clock, typer.Option(help="cpu goes with --threads 1.")] = Clock.wall,
) -> None:
    """Print how long each kernel takes beside the least that its bytes would take at the bandwidth of a probe."""
    torch.set_num_threads(threads)
    source = models.load(model, precision, Progress())
    fast = models.compiled(source, precision, backend="cpp", batch_sizes=(batch,), progress=Progress())
    runs = prepare(fast, models.prompt(source, size).repeat(batch, 1), phase)
    whole = _best(lambda: runs.run(0, runs.count), repeats, clock)
    times = kernel_times(runs, repeats, clock)
    with bandwidth_probe(threads) as probe:
        bandwidth = max(probe(1, clock.now) for _ in range(repeats))
    title = f"{model} {precision}, {phase.value} {size}, batch {batch}, {threads} threads"
    console.print(table(times, bandwidth, title))
    least = sum(t.cost.bytes * len(t.seconds) for t in times) / bandwidth
    console.print(
        f"whole step {whole * 1e3:.2f} ms, sum of kernels {sum(sum(t.seconds) for t in times) * 1e3:.2f} ms; "
        f"its bytes take {least * 1e3:.2f} ms at the probe's {bandwidth / 1e9:.1f} GB/s",
        highlight=False,
    )


@dataclass(frozen=True)
class ProgramRuns:
    """A program bound to a request: ``run(first, last)`` runs a range of its ``steps``.

    ``memory`` holds on to the tensors whose addresses the program has.
    """

    steps: tuple[Step, ...]
    dims: dict[str, int]
    run: Callable[[int, int], None]
    memory: tuple[Any, ...]

    @property
    def count(self) -> int:
        return len(self.steps)


def prepare(fast: Any, ids: torch.Tensor, phase: Phase) -> ProgramRuns:
    """Bind a program to a request with the prompts i64[B, S]: all of them, or (decode) their last tokens.

    Runs the whole program once. Steps write into the same state again and again; their results do not matter.
    """
    batch, size = ids.shape
    with torch.no_grad():
        cache = fast(input_ids=ids[:, :-1], logits_to_keep=1).past_key_values
    engine, state = cache.engine, cache.state
    if phase is Phase.decode:
        executor, inputs, outputs = engine.decode_executors[state.rows], state.step_inputs, state.step_outputs
        dims = {"B": state.rows, "S": 1, "T": size, "L": 1}
    else:
        executor, dims = engine.prefill_executor, {"B": batch, "S": size, "T": size, "L": 1}
        positions = torch.arange(size).expand(batch, -1).contiguous()
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": state.mask}
        outputs = {o.name: o.empty(dims, ids.device) for o in engine.spec.outputs}
    assert isinstance(executor, NativeExecutor)
    executor.run(inputs, dims, state, outputs)
    bound, library = state.scratch[executor], executor.library
    sizes = library.dims([dims[name] for name, _, _ in executor.program.symbols])
    threads = torch.get_num_threads()

    def run(first: int, last: int) -> None:
        library.run(bound.table, sizes, bound.workspace.data_ptr(), threads, first=first, last=last)

    steps = tuple(step for step, _, _ in executor.program.trace())
    return ProgramRuns(steps, dims, run, (state, inputs, outputs))


def kernel_times(runs: ProgramRuns, repeats: int, clock: Clock) -> list[KernelTime]:
    """The best of ``repeats`` runs of every step, less the cost of calling the library, grouped by kernel."""
    now = clock.now
    best = [float("inf")] * runs.count
    for _ in range(repeats):
        for n, step in enumerate(runs.steps):
            if step.op.opcode == "kernel":
                start = now()
                runs.run(n, n + 1)
                best[n] = min(best[n], now() - start)
    empty = _best(lambda: runs.run(0, 0), 5 * repeats, clock)
    found: dict[str, KernelTime] = {}
    for step, seconds in zip(runs.steps, best, strict=True):
        if step.op.opcode == "kernel":
            known = found.get(step.name)
            before = known.seconds if known else ()
            cost = step_cost(step, runs.dims)
            found[step.name] = KernelTime(
                step.name, _module(step), (*before, max(seconds - empty, 0.0)), cost
            )
    return list(found.values())


def table(times: list[KernelTime], bandwidth: float, title: str) -> Table:
    """One row per distinct kernel; ``bandwidth`` (bytes/s) sets the floor."""
    columns = ("kernel", "computes", "runs", "µs", "KB", "floor µs", "µs / floor", "GFLOP/s", "total ms")
    shown = Table(title=title, title_justify="left")
    for n, name in enumerate(columns):
        shown.add_column(name, justify="right" if n > 1 else "left", overflow="fold")
    for t in times:
        floor = t.cost.bytes / bandwidth
        rate = t.cost.flops / t.typical / 1e9 if t.typical else 0.0
        shown.add_row(
            t.name,
            t.module,
            str(len(t.seconds)),
            f"{t.typical * 1e6:.1f}",
            f"{t.cost.bytes / 1e3:.1f}",
            f"{floor * 1e6:.1f}",
            f"{t.typical / floor:.2f}" if floor else "",
            f"{rate:.1f}",
            f"{sum(t.seconds) * 1e3:.2f}",
        )
    return shown


def _module(step: Step) -> str:
    """The model modules whose ops the kernel computes, in order."""
    names = dict.fromkeys(op.loc.module for op in step.op.body if op.loc.module)
    return " ".join(names) or step.op.loc.module


def _best(run: Callable[[], None], repeats: int, clock: Clock) -> float:
    now, best = clock.now, float("inf")
    for _ in range(repeats):
        start = now()
        run()
        best = min(best, now() - start)
    return best


if __name__ == "__main__":
    typer.run(main)
