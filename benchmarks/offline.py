"""Compiles every kernel of the large models for GPUs that need not be there: ``python -m benchmarks.offline``.

Each decode bucket and prefill, each form of the weights: what the cost model chose has to compile, to spill nothing and
to fit into shared memory. Ends with exit status 1 where something does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.estimates import DEVICES, FORMS, plans
from benchmarks.large_models import BUILDERS
from benchmarks.options import known
from tilewright.cli import readable_errors
from tilewright.codegen.triton.offline import compile_program
from tilewright.codegen.triton.program import emit_program
from tilewright.progress import Progress

CONTEXT = 2048
console = Console()


@dataclass(frozen=True)
class Job:
    """A model in one form, for one GPU. residents: programs of its persistent kernels on each multiprocessor."""

    model: str
    precision: str
    device: str
    batch_sizes: tuple[int, ...]
    residents: int = 0

    def __str__(self) -> str:
        return f"{self.model} {self.precision} on {self.device}"


@dataclass(frozen=True)
class Kernel:
    """What a compiled kernel uses; stack counts bytes of spills, and of tables that library functions keep there."""

    program: str
    name: str
    registers: int
    stack: int
    shared: int
    fits: bool
    wgmma: bool


def compiled(job: Job) -> list[Kernel]:
    """Plan a model and compile its kernels. Raises KernelBuildError, naming the kernel that does not compile."""
    gpu = DEVICES[job.device]
    found = []
    for program in plans(job.model, job.precision, job.batch_sizes, CONTEXT, layers=1):
        for r in compile_program(emit_program(program, device=gpu, residents=job.residents), gpu.arch):
            found.append(
                Kernel(program.name, r.kernel, r.registers, r.spills, r.shared, r.fits, "wgmma" in r.ptx)
            )
    return found


@readable_errors
def main(
    model: Annotated[str, typer.Option(help="Models, separated by commas.")] = ",".join(BUILDERS),
    precision: Annotated[str, typer.Option(help="Forms of the weights, separated by commas.")] = ",".join(
        FORMS
    ),
    device: Annotated[str, typer.Option(help="GPUs, separated by commas.")] = ",".join(DEVICES),
    batch_sizes: Annotated[str, typer.Option(help="Decode batch sizes, separated by commas.")] = "1,4,16,64",
    residents: Annotated[
        int,
        typer.Option(
            min=0, help="Also print each layer as a persistent kernel, so many on a multiprocessor."
        ),
    ] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Compilers side by side.")] = os.cpu_count() or 1,
    output: Annotated[Path | None, typer.Option(help="Also write what was found there, as JSON.")] = None,
) -> None:
    """Compile, and print a line per model, form and GPU."""
    import triton

    buckets = tuple(int(n) for n in batch_sizes.split(","))
    jobs = [
        Job(name, form, gpu, buckets, residents)
        for gpu in known("--device", device, tuple(DEVICES))
        for name in known("--model", model, tuple(BUILDERS))
        for form in known("--precision", precision, tuple(FORMS))
    ]
    table = Table(title=f"Triton {triton.__version__}, decode at batch {batch_sizes} and prefill")
    for column in ("model", "kernels", "most registers", "most shared KB", "on wgmma", "do not fit"):
        table.add_column(column, justify="left" if column == "model" else "right")
    results = {}
    for job, kernels in _run(jobs, processes):
        results[str(job)] = kernels
        misfits = [f"{k.program} {k.name} ({k.stack} bytes of stack)" for k in kernels if not k.fits]
        table.add_row(
            str(job),
            str(len(kernels)),
            str(max(k.registers for k in kernels)),
            f"{max(k.shared for k in kernels) / 1024:.0f}",
            str(sum(k.wgmma for k in kernels)),
            "\n".join(misfits) or "0",
        )
    console.print(table)
    if output is not None:
        record = {name: [asdict(k) for k in kernels] for name, kernels in results.items()}
        output.write_text(json.dumps({"triton": triton.__version__, "kernels": record}, indent=1) + "\n")
    if any(not k.fits for kernels in results.values() for k in kernels):
        raise typer.Exit(1)


def _run(jobs: list[Job], processes: int) -> Iterator[tuple[Job, list[Kernel]]]:
    with (
        Progress().step("Compiling", total=len(jobs)) as advance,
        ProcessPoolExecutor(min(processes, len(jobs))) as pool,
    ):
        for job, kernels in zip(jobs, pool.map(compiled, jobs), strict=True):
            advance(str(job))
            yield job, kernels


if __name__ == "__main__":
    typer.run(main)
