"""Times many tiles of each product of the large models' layers: ``python -m benchmarks.tiles``.

The cost model orders the tiles that a product may have, and its constants are only as good as what they were fitted to.
This takes the first of that order, many more than a tuner tries, times each where it stands in a program of two layers,
and writes what ``tests/codegen/h100_tiles.json`` holds: the numbers of each product, and microseconds by tile. Kernels
of prompts are timed by events, as a tuner does; those of decode steps, which overlap, as they are replayed. It needs a
GPU, and a few minutes; nothing is downloaded.
"""

from __future__ import annotations

import datetime
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks import machine
from benchmarks.estimates import FORMS, options_of, plans
from benchmarks.large_models import BUILDERS
from benchmarks.options import command_line, known
from benchmarks.replays import replayed_seconds
from tilewright.backends import build
from tilewright.cli import readable_errors
from tilewright.codegen.triton.environment import Environment
from tilewright.codegen.triton.estimate import candidates
from tilewright.codegen.triton.plan import plan_parts
from tilewright.codegen.triton.tiling import Tile
from tilewright.codegen.triton.work import ProductWork, sizes_of
from tilewright.codegen.tunables import NONE
from tilewright.errors import DeviceError
from tilewright.estimates import gpu
from tilewright.ir.program import BufferKind, Program
from tilewright.options import Options
from tilewright.progress import Progress
from tilewright.runtime.device import is_interpreting
from tilewright.runtime.executor import EngineSpec, Executor
from tilewright.runtime.files import write_atomically
from tilewright.trials import Trial
from tilewright.tune_kernels import KernelTuner

COLUMNS = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "transposed", "descriptors")
console = Console()


@dataclass
class Timed:
    """A kernel that is one product: its numbers, and microseconds by tile, the fields ``COLUMNS`` of it."""

    kernel: str
    work: ProductWork
    tiles: dict[tuple[int, ...], float] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """As the file has it, fastest first."""
        tiles = sorted(self.tiles.items(), key=lambda pair: pair[1])
        return {
            "kernel": self.kernel,
            "work": asdict(self.work),
            "tiles": [[*sizes, us] for sizes, us in tiles],
        }


@readable_errors
def main(
    models: Annotated[str, typer.Option(help=f"{', '.join(BUILDERS)}, separated by commas.")] = "llama2-7b",
    precision: Annotated[
        str, typer.Option(help=f"{', '.join(FORMS)}, separated by commas.")
    ] = "bf16,int8,int4",
    batch_sizes: Annotated[str, typer.Option(help="Decode batch sizes, separated by commas.")] = "1,8",
    most: Annotated[int, typer.Option(min=2, help="Tiles of each product.")] = 40,
    output: Annotated[Path, typer.Option(help="File for what was measured.")] = Path("tiles.json"),
) -> None:
    """Time the tiles and write the file, after each program."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not is_interpreting():
        raise DeviceError(
            "tiles are timed on a CUDA device, and this machine has none; run this where there is one"
        )
    buckets = [int(n) for n in batch_sizes.split(",")]
    found: list[Timed] = []
    for name in known("--models", models, tuple(BUILDERS)):
        for form in known("--precision", precision, tuple(FORMS)):
            with Progress().step(f"{name} {form}") as advance:
                options = options_of(device, form, buckets, 2048)
                programs = plans(name, form, buckets, 2048, layers=2)
                spec = EngineSpec.of(programs[-1], "decoder", device, vocab_size=1000, chunk=options.chunk)
                for program in programs:
                    advance(program.name)
                    found += timed(f"{name} {form}", program, spec, options, most)
                    write_atomically(output, _text(found, device))
    console.print(f"{sum(len(t.tiles) for t in found)} times in {output}", highlight=False)


def timed(title: str, program: Program, spec: EngineSpec, options: Options, most: int) -> Iterator[Timed]:
    """Every kernel of a program that is one product: its numbers at the sizes that are timed, and its tiles."""
    trial, device = Trial.of(program, spec), gpu(spec.device)
    env = Environment.of(program, False, {}, device)
    sizes = sizes_of({**env.largest, **trial.dims, "L": 1})
    parts = {s.name: (s.op, plan_parts(s.op, sizes)) for s in program.kernels()}
    works = {
        op: planned[0].work
        for op, planned in parts.values()
        if len(planned) == 1 and isinstance(planned[0].work, ProductWork)
    }
    tuner = KernelTuner.of(
        program, lambda op, _: candidates(op, env, most) if op in works else (NONE,), options
    )
    variants = tuner.variants
    weights = random_weights(program, spec.device)
    executors = build([program] * len(variants), weights, options, variants).executors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tile that does not run is told by its time
        times = _times(program, tuner, executors, trial)
    for name, ways in tuner.ways.items():
        op, _ = parts[name]
        found = Timed(f"{title} {program.name} {name}", works[op])
        for way, seconds in zip(ways, (t[name] for t in times), strict=False):
            changed = Environment.of(program, False, {name: way}, device)
            (tile,) = changed.tiles(op, plan_parts(op, env.sizes))
            if seconds < float("inf") and not (tile.persistent or tile.group):
                found.tiles[_sizes(tile)] = round(seconds * 1e6, 1)
        yield found


def _times(
    program: Program, tuner: KernelTuner, executors: Sequence[Executor], trial: Trial
) -> list[dict[str, float]]:
    """Seconds of each kernel in each variant of a program."""
    if program.phase == "decode" and torch.cuda.is_available():
        return [replayed_seconds(program, executor, trial) for executor in executors]
    runs = Counter(step.name for step, _, _ in program.trace())
    return [{n: s / runs[n] for n, s in found.items()} for found in tuner.times(executors, trial)]


def random_weights(program: Program, device: torch.device) -> dict[str, Tensor]:
    """Values for every parameter of a program: small floats, and any codes."""
    made = {}
    for _, buffer in program.of_kind(BufferKind.param):
        shape, dtype = tuple(int(d) for d in buffer.type.shape), buffer.type.dtype.torch
        if dtype.itemsize == 1 and dtype != torch.bool:
            made[buffer.name] = torch.randint(0, 100, shape, device=device, dtype=torch.uint8).view(dtype)
        else:
            made[buffer.name] = torch.randn(shape, device=device).mul_(0.02).to(dtype)
    return made


def _sizes(tile: Tile) -> tuple[int, ...]:
    return tuple(int(getattr(tile, name)) for name in COLUMNS)


def _text(found: Sequence[Timed], device: torch.device) -> str:
    versions = ", ".join(
        f"{name} {v}" for name, v in machine.versions().items() if name in ("torch", "triton")
    )
    about = (
        "Microseconds of kernels by tile, each where it stands in a program of two layers: of prompts by events around "
        "its launch (some 2 of them are the events'), the mean of a program's runs, each at its best; of decode steps "
        "as they are replayed, from the end of the kernel before to its own, by the profiler, the median; on "
        f"{machine.device_name(device)}, {versions}, {datetime.datetime.now(datetime.UTC).date()}; "
        f"{command_line('benchmarks.tiles')}."
    )
    text = json.dumps(
        {"about": about, "columns": [*COLUMNS, "microseconds"], "kernels": [t.data() for t in found]}
    )
    return text.replace("], [", "],\n   [").replace('{"kernel"', '\n  {"kernel"') + "\n"


if __name__ == "__main__":
    typer.run(main)
