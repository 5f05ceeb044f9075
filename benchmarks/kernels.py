"""Times each kernel of a program against what it has to read and write: ``python -m benchmarks.kernels``.

Every kernel runs where it stands in the program, after the one before it, so that weights come from memory and
activations from cache as in a real step. ``--clock cpu`` with one thread counts processor time, which a busy machine
disturbs less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import models
from benchmarks.probe import bandwidth_probe
from tilewright.cache import cache_of
from tilewright.cli import readable_errors
from tilewright.costs import Cost, step_cost
from tilewright.ir.program import Step
from tilewright.progress import Progress
from tilewright.runtime.kv_state import RequestState
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
    whole = _best(runs.run, repeats, clock)
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
    """A program and the request that it runs on, again and again into the same state; results do not matter."""

    executor: NativeExecutor
    dims: dict[str, int]
    state: RequestState
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def run(self) -> None:
        self.executor.run(self.inputs, self.dims, self.state, self.outputs)

    def step_seconds(self, clock: Clock) -> list[float]:
        return self.executor.step_seconds(self.inputs, self.dims, self.state, self.outputs, clock.now)


def prepare(fast: Any, ids: Tensor, phase: Phase) -> ProgramRuns:
    """A program and a request with the prompts i64[B, S]: all of them, or (decode) their last tokens.

    Runs the whole program once.
    """
    batch, size = ids.shape
    with torch.no_grad():
        cache = cache_of(fast(input_ids=ids[:, :-1], logits_to_keep=1))
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
    runs = ProgramRuns(executor, dims, state, inputs, outputs)
    runs.run()
    return runs


def kernel_times(runs: ProgramRuns, repeats: int, clock: Clock) -> list[KernelTime]:
    """The best of ``repeats`` runs of every step, grouped by kernel."""
    rounds = [runs.step_seconds(clock) for _ in range(repeats)]
    best = [min(seconds) for seconds in zip(*rounds, strict=True)]
    found: dict[str, KernelTime] = {}
    for (step, _, _), seconds in zip(runs.executor.program.trace(), best, strict=True):
        if step.op.opcode == "kernel":
            known = found.get(step.name)
            before = known.seconds if known else ()
            cost = step_cost(step, runs.dims)
            found[step.name] = KernelTime(step.name, _module(step), (*before, seconds), cost)
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
