"""At which number of rows M the forms of each product change places, by estimate and, where there are records, by
measurement (see ``codegen.triton.dataflow``). The last table of ``python -m benchmarks.estimates``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from tilewright.backends import candidates
from tilewright.codegen.triton.dataflow import FEW_ROWS, FLAT, GEMM, GEMV, MOST_ROWS, form_of, thresholds
from tilewright.codegen.triton.device import Device
from tilewright.codegen.triton.environment import Environment
from tilewright.codegen.triton.estimate import tiles_text
from tilewright.codegen.triton.plan import plan_parts
from tilewright.codegen.triton.work import ProductWork
from tilewright.estimates import gpu
from tilewright.ir.program import Program
from tilewright.options import Options
from tilewright.tune_kernels import KernelTuner

Shape = tuple[int, int, int]
"""Columns N, K, and products that are computed together."""


def shape_name(shape: Shape) -> str:
    """``4096 x 4096``, and how many products are computed together."""
    columns, k, together = shape
    return f"{columns} x {k}" + (f", {together} together" if together > 1 else "")


def products(program: Program, device: Device) -> dict[Shape, ProductWork]:
    """The distinct products of a program."""
    sizes = Environment.of(program, False, {}, device).sizes
    works = [part.work for step in program.kernels() for part in plan_parts(step.op, sizes)]
    return {(w.columns, w.k, w.dots): w for w in works if isinstance(w, ProductWork)}


def measured(programs: Sequence[Program], options: Options) -> dict[Shape, dict[int, str]]:
    """For each shape, by M, the tile that measurements on ``options.device`` chose for a decode step, and its form."""
    found: dict[Shape, dict[int, str]] = {}
    device = gpu(options.device)
    for program in programs:
        if program.phase != "decode":
            continue
        tuner = KernelTuner.of(program, candidates(options), options)
        ops = {step.name: step.op for step in program.kernels()}
        for kernel, changes in tuner.measured().items():
            env = Environment.of(program, False, {kernel: changes}, device)
            plans = plan_parts(ops[kernel], env.sizes)
            for plan, tile in zip(plans, env.tiles(ops[kernel], plans), strict=True):
                if isinstance(plan.work, ProductWork):
                    shape = (plan.work.columns, plan.work.k, plan.work.dots)
                    text = f"{form_of(tile, program.batch)} ({tiles_text(ops[kernel], env)})"
                    found.setdefault(shape, {})[program.batch] = text
    return found


def dataflow_table(
    program: Program, device: Device, records: Mapping[Shape, Mapping[int, str]] | None = None
) -> Table:
    """A row per product: the thresholds by the cost model, those by which kernels are generated, and what measurement
    chose."""
    title = f"{GEMV}, {FLAT} and {GEMM} by M = 1..{MOST_ROWS}: estimated for {device.name}, not measured"
    table = Table(title=title, title_justify="left")
    for column in (
        "N x K",
        f"{FLAT} from M",
        f"{GEMM} from M",
        "generated so from M",
        "chosen by measurement",
    ):
        table.add_column(column)
    for shape, work in products(program, device).items():
        estimate = thresholds(work, device)
        lines = [f"M={m}: {text}" for m, text in sorted((records or {}).get(shape, {}).items())]
        table.add_row(
            shape_name(shape),
            _from(estimate.flat_from),
            _from(estimate.gemm_from),
            f"2, {FEW_ROWS + 1}",
            "\n".join(lines) or "no record",
        )
    return table


def _from(rows: int | None) -> str:
    return f"beyond {MOST_ROWS}" if rows is None else str(rows)
