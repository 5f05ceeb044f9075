"""What decode steps and prefill should take on a GPU, kernel by kernel: ``python -m benchmarks.estimates``.

Nothing is measured and no GPU is needed: these are estimates, beside the least that bytes and FLOPs allow. The last
tables say which tile the cost model gives a product at each number of rows, and where a matrix-vector product, a flat
one and a general one change places (FlashDecoding++, Hong et al., 2023, "heuristic dataflow"), beside what was chosen
by measurement on this machine's GPU, where that is on record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.dataflow import dataflow_table, measured, products, shape_name
from benchmarks.large_models import BUILDERS, without_values
from benchmarks.options import known, lengths
from tilewright.cli import readable_errors
from tilewright.codegen.triton.candidates import ranked
from tilewright.codegen.triton.cost_model import seconds
from tilewright.codegen.triton.device import A100, H100, Device
from tilewright.codegen.triton.work import ProductWork
from tilewright.estimates import estimates
from tilewright.ir.program import Program
from tilewright.options import Options
from tilewright.phases import plan_programs
from tilewright.progress import Progress
from tilewright.report import PhaseReport, kernel_table

DEVICES = {"h100": H100, "a100": A100}
FORMS = {"bf16": ("", ""), "int8": ("int8", ""), "int4": ("int4", ""), "fp8": ("fp8", "f8")}
"""Options ``weights`` and ``kv_cache``, by the name of the precision."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
console = Console(width=140)


@readable_errors
def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(BUILDERS)}, separated by commas.")] = "llama2-7b",
    precision: Annotated[str, typer.Option(help="bf16, int8, int4 or fp8 (weights and KV cache).")] = "bf16",
    batch_sizes: Annotated[str, typer.Option(help="Decode batch sizes, separated by commas.")] = "1,4,16,64",
    context: Annotated[str, typer.Option(help="Context of a decode step, and tokens of a prompt.")] = "1024",
    device: Annotated[str, typer.Option(help="h100 or a100.")] = "h100",
) -> None:
    """Print estimates for decode steps and prefill."""
    (gpu,) = (DEVICES[name] for name in known("--device", device, tuple(DEVICES))[:1])
    (form,) = known("--precision", precision, tuple(FORMS))[:1]
    (tokens,) = lengths("--context", context)[:1]
    sizes = [int(n) for n in batch_sizes.split(",")]
    for name in known("--model", model, tuple(BUILDERS)):
        with Progress().step(f"Planning {name}"):
            programs = plans(name, form, sizes, tokens)
        phases = [phase_report(p, tokens, gpu) for p in programs]
        for phase in phases:
            console.print(kernel_table(phase))
            console.print()
        console.print(summary(f"{name} {precision}", phases))
        console.print(rows_table(programs[0], gpu))
        console.print(
            dataflow_table(programs[0], gpu, measured(programs, options_of(here(), form, sizes, tokens)))
        )


def plans(name: str, form: str, batch_sizes: Sequence[int], tokens: int, layers: int = 0) -> list[Program]:
    """The Triton programs of a model, or of its first ``layers``, in one of ``FORMS``: decode per batch, prefill."""
    built = without_values(name, layers)
    return plan_programs(built, options_of(built.device, form, batch_sizes, tokens))


def options_of(device: torch.device, form: str, batch_sizes: Sequence[int], tokens: int) -> Options:
    """What ``compile`` would be asked for."""
    weights, kv_cache = FORMS[form]
    return Options(
        batch_sizes=tuple(batch_sizes),
        max_length=max(2048, tokens),
        weights=weights,
        kv_cache=kv_cache,
        autotune="off",
        backend="triton",
        device=device,
        dump=None,
    )


def here() -> torch.device:
    """This machine's GPU, or the CPU, for which nothing of the Triton backend is on record."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def phase_report(program: Program, tokens: int, device: Device) -> PhaseReport:
    """A program at ``tokens`` of context; of a prompt, one chunk."""
    highs = {name: high for name, _, high in program.symbols}
    dims = {"B": program.batch, "S": 1, "L": 1, "T": tokens}
    if program.phase != "decode":
        dims = {"B": 1, "S": min(tokens, highs["S"]), "L": 1, "T": min(tokens, highs["S"])}
    return PhaseReport.of(program, dims, device.name, estimates(program, dims, device, {}))


def summary(title: str, phases: Sequence[PhaseReport]) -> Table:
    """Milliseconds of a run and tokens per second, at the floor and as estimated."""
    table = Table(title=f"{title}: estimates, not measured", title_justify="left")
    for column in ("program", "sizes", "floor ms", "estimate ms", "floor / estimate", "tokens/s (estimate)"):
        table.add_column(column, justify="left" if column in ("program", "sizes") else "right")
    for p in phases:
        sizes = " ".join(f"{n}={s}" for n, s in sorted(p.dims.items()))
        share = f"{p.floor_seconds / p.estimated_seconds:.0%}"
        rate = f"{p.dims['B'] * p.dims['S'] / p.estimated_seconds:.0f}"
        table.add_row(
            p.name, sizes, f"{p.floor_seconds * 1e3:.3f}", f"{p.estimated_seconds * 1e3:.3f}", share, rate
        )
    return table


def rows_table(program: Program, device: Device) -> Table:
    """The default tile of each product of a program, by its number of rows."""
    table = Table(title=f"Tile by rows (columns x k; {device.name})", title_justify="left")
    table.add_column("product")
    for rows in ROWS:
        table.add_column(str(rows))
    for shape, work in products(program, device).items():
        table.add_row(shape_name(shape), *(_tile_text(work, rows, device) for rows in ROWS))
    return table


def _tile_text(work: ProductWork, rows: int, device: Device) -> str:
    """``vector 4x512``, or rows x columns x k of a tile, and its estimated microseconds."""
    sized = work.of_rows(rows)
    tile = ranked(sized, device)[0]
    blocks = f"{tile.block_n}x{tile.block_k}"
    kind = "vector" if rows == 1 else "flat" if tile.transposed else f"{tile.block_m}"
    separator = " " if kind in ("vector", "flat") else "x"
    return f"{kind}{separator}{blocks}\n{seconds(sized, tile, device) * 1e6:.0f} µs"


if __name__ == "__main__":
    typer.run(main)
