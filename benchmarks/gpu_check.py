"""Everything that a few minutes on a GPU can tell, in one command: ``python -m benchmarks.gpu_check``.

Runs the tests that need a GPU, measures the device's own rates, times every kernel of two layers of Llama2-7B against
its floor, before and after tuning and beside what the vendor's libraries take, measures a few points of the chart, and
writes one result file. A part that fails is reported and the others go on; none begins when the time is over.
``--scale tiny`` runs the same code on a tiny model, also on a CPU.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from rich.console import Console
from rich.table import Table

import tilewright as tw
from benchmarks import machine, stored
from benchmarks.large_models import BUILDERS, TINY
from benchmarks.options import command_line, known
from benchmarks.peers import peer_seconds
from benchmarks.probe import device_probe
from benchmarks.step_gaps import StepGap, step_gap
from tilewright.cli import readable_errors
from tilewright.costs import step_cost
from tilewright.progress import Progress
from tilewright.report import size_text
from tilewright.runtime.cuda_graph import recorded_bytes
from tilewright.trials import Trial

ROOT = Path(__file__).parent.parent
console = Console(width=140)


@dataclass(frozen=True)
class Scale:
    """model and layers: what to compile. batch_sizes: decode buckets. side: of the large product. tests: seconds that
    they may take. chart: arguments of ``benchmarks.chart``."""

    model: str
    layers: int
    batch_sizes: tuple[int, ...]
    max_length: int
    side: int
    tests: int
    chart: tuple[str, ...]


SCALES = {
    "paper": Scale(
        "llama2-7b", 2, (1, 16), 2048, 8192, 150,
        ("--models", "llama2-7b", "--systems", "eager,bf16,int8,int4", "--repeats", "2", "--minutes", "2.5"),
    ),
    "tiny": Scale(
        "tiny-llama", 2, (1, 2), 64, 256, 60,
        ("--scale", "tiny", "--models", "tiny-llama", "--systems", "eager,bf16", "--repeats", "1", "--minutes", "1"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class KernelTime:
    """A kernel of a program: seconds of its best run, and bytes and FLOPs of a run. estimate: seconds that the cost
    model expects of its default tile; 0 without one. peer: seconds that the vendor's library takes for the same product
    or attention; 0 where it has none."""

    program: str
    tuned: bool
    kernel: str
    seconds: float
    bytes: int
    flops: int
    estimate: float
    peer: float


@dataclass(frozen=True)
class GpuCheck:
    """One run. bandwidth: bytes/s that a read of device memory reaches. half_flops: FLOP/s of a large bfloat16 product.
    gaps: decode steps of those few layers, with what lies between them. graph_bytes: memory that recorded decode steps
    hold on the device. parts: what each part said, by its name; "failed: ..." with the reason."""

    KIND: ClassVar[str] = "gpu-check"
    SCHEMA: ClassVar[int] = 2
    COMMAND: ClassVar[str] = "python -m benchmarks.gpu_check"

    date: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    bandwidth: float
    half_flops: float
    kernels: tuple[KernelTime, ...]
    gaps: tuple[StepGap, ...]
    graph_bytes: int
    parts: dict[str, str]

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> GpuCheck:
        """The run that plain data describes. Raises KeyError or TypeError where something is missing."""
        return cls(
            **data
            | {
                "kernels": stored.records(KernelTime, data["kernels"]),
                "gaps": stored.records(StepGap, data["gaps"]),
            }
        )


@readable_errors
def main(
    scale: Annotated[str, typer.Option(help="paper, or tiny to try the command anywhere.")] = "paper",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Begin no part later than this.")] = 8.5,
    output: Annotated[
        Path | None, typer.Option(help="Result file instead of one in benchmarks/results.")
    ] = None,
) -> None:
    """Run every part and write what they gave."""
    plan = SCALES[known("--scale", scale, tuple(SCALES))[0]]
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check = _Check(plan, target, time.monotonic() + 60 * minutes)
    check.part("tests", check.tests)
    check.part("rates", check.rates)
    check.part("kernels", lambda: check.times("off"))
    check.part("kernels, tuned", lambda: check.times("full"))
    chart = None if output is None else output.with_name(f"{output.stem}-chart.json")
    check.part("steps", check.steps)
    check.part("chart", lambda: check.chart(chart))
    facts = machine.describe() | {"device": machine.device_name(target)}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = GpuCheck(
        now, command_line("benchmarks.gpu_check"), facts, machine.versions(), check.bandwidth, check.half_flops,
        tuple(check.kernels), tuple(check.gaps), check.graph_bytes, check.results,
    )  # fmt: skip
    console.print(table(result))
    for name, said in result.parts.items():
        console.print(f"{name}: {said}", highlight=False)
    console.print(f"stored in {stored.save(result, output)}", highlight=False)
    if any(said.startswith("failed") for said in result.parts.values()):
        raise typer.Exit(1)


@dataclass
class _Check:
    plan: Scale
    device: torch.device
    deadline: float
    bandwidth: float = 0.0
    half_flops: float = 0.0
    kernels: list[KernelTime] = field(default_factory=list)
    gaps: list[StepGap] = field(default_factory=list)
    graph_bytes: int = 0
    results: dict[str, str] = field(default_factory=dict)
    source: Any = None
    compiled: Any = None

    def part(self, name: str, run: Callable[[], str]) -> None:
        """Run a part and keep what it says, or why it failed."""
        if time.monotonic() > self.deadline:
            self.results[name] = "left out, the time is over"
            return
        with Progress().step(name.capitalize()):
            try:
                self.results[name] = run()
            except Exception as error:  # noqa: BLE001 - whatever goes wrong on a new machine, the other parts tell more
                traceback.print_exc()
                self.results[name] = f"failed: {type(error).__name__}: {str(error).strip()[:200]}"

    def tests(self) -> str:
        """pytest's summary of tests/gpu."""
        command = [sys.executable, "-m", "pytest", "-q", "--maxfail=5", "-p", "no:cacheprovider", "tests/gpu"]
        if find_spec("xdist") is not None:
            command += ["-n", str(min(8, os.cpu_count() or 1))]  # most of it is compiling
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=self.plan.tests, check=False
        )
        last = (done.stdout.strip().splitlines() or ["nothing printed"])[-1]
        return last if done.returncode in (0, 5) else f"failed: {last}"

    def rates(self) -> str:
        """The device's bandwidth, and its rate at a large product."""
        with device_probe(self.device) as probe:
            self.bandwidth = max(probe() for _ in range(3))
        side = self.plan.side
        a, b = (torch.ones(side, side, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        self.half_flops = 2.0 * side**3 / peer_seconds(lambda: a @ b, self.device)
        return f"{self.bandwidth / 1e9:.0f} GB/s, {self.half_flops / 1e12:.1f} TFLOP/s in bfloat16"

    def times(self, autotune: str) -> str:
        """Every kernel of the programs of a few layers."""
        from benchmarks import peers

        if self.source is None:
            torch.manual_seed(0)
            build = {**BUILDERS, **TINY}[self.plan.model]
            with self.device:
                self.source = build(self.plan.layers, 0).to(torch.bfloat16).eval()
        start = time.monotonic()
        fast = tw.compile(
            self.source, batch_sizes=self.plan.batch_sizes, max_length=self.plan.max_length, autotune=autotune
        )
        taken = f"compiled in {time.monotonic() - start:.1f} s"
        engine = fast._tilewright.engine
        for executor in (*engine.decode_executors.values(), engine.prefill_executor):
            trial = Trial.of(executor.program, engine.spec)
            given = (trial.inputs, trial.dims, trial.state, trial.outputs)
            rounds = [executor.step_seconds(*given) for _ in range(6)][1:]
            best = [min(seconds) for seconds in zip(*rounds, strict=True)]
            estimates = {e.kernel: e.seconds for e in _estimates(executor.program, trial.dims, self.device)}
            least: dict[str, float] = {}
            steps = {}
            for (step, _, _), seconds in zip(executor.program.trace(), best, strict=True):
                if step.op.opcode == "kernel":
                    least[step.name] = min(seconds, least.get(step.name, seconds))
                    steps[step.name] = step
            for name, seconds in least.items():
                cost = step_cost(steps[name], trial.dims)
                peer = peers.of(steps[name], trial.dims, self.device)
                self.kernels.append(
                    KernelTime(
                        executor.program.name,
                        autotune == "full",
                        name,
                        seconds,
                        cost.bytes,
                        cost.flops,
                        estimates.get(name, 0.0),
                        peer,
                    )
                )
        self.compiled = fast
        return "; ".join((taken, *fast.report().notes))

    def steps(self) -> str:
        """Whole decode steps of the model compiled last, and the device memory that recordings of them take."""
        for batch in self.plan.batch_sizes:
            self.gaps.append(step_gap(self.compiled, batch, 32))
        self.graph_bytes = recorded_bytes()
        gaps = ", ".join(f"batch {g.batch}: {1e6 * g.token:.0f} µs, {g.share:.1%} of it" for g in self.gaps)
        return f"from token to token {gaps} without the model; {size_text(self.graph_bytes)} for recordings"

    def chart(self, output: Path | None) -> str:
        """Some points of the chart, in a process of their own."""
        self.source = self.compiled = None
        where = ["--output", str(output)] if output else []
        command = [sys.executable, "-m", "benchmarks.chart", *self.plan.chart, *where]
        done = subprocess.run(
            [*command, "--device", self.device.type], cwd=ROOT, capture_output=True, text=True, check=False
        )
        said = " ".join(line.strip() for line in done.stderr.splitlines() if "stored" in line)
        return said if done.returncode == 0 else f"failed: {done.stderr.strip()[-300:]}"


def _estimates(program: Any, dims: dict[str, int], device: torch.device) -> tuple[Any, ...]:
    from tilewright.estimates import estimates, gpu

    return estimates(program, dims, gpu(device), {}) if device.type == "cuda" else ()


def table(check: GpuCheck) -> Table:
    """A row per kernel: its time beside the floor of its bytes or FLOPs at the rates that were measured."""
    shown = Table(title=f"Kernels on {check.machine['device']}", title_justify="left")
    for name in (
        "program",
        "kernel",
        "µs",
        "floor µs",
        "of floor",
        "GB/s",
        "TFLOP/s",
        "estimate µs",
        "vendor µs",
    ):
        shown.add_column(name, justify="left" if name in ("program", "kernel") else "right")
    for k in check.kernels:
        floor = max(k.bytes / max(check.bandwidth, 1.0), k.flops / max(check.half_flops, 1.0))
        rate = 1 / k.seconds if k.seconds else 0.0
        shown.add_row(
            k.program + (" tuned" if k.tuned else ""), k.kernel, f"{k.seconds * 1e6:.1f}", f"{floor * 1e6:.1f}",
            f"{floor * rate:.0%}", f"{k.bytes * rate / 1e9:.0f}", f"{k.flops * rate / 1e12:.1f}",
            f"{k.estimate * 1e6:.1f}" if k.estimate else "", f"{k.peer * 1e6:.1f}" if k.peer else "",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    typer.run(main)
