"""Everything that a few minutes on a GPU can tell, in one command: ``python -m benchmarks.gpu_check``.

Runs the tests that need a GPU, measures the device's own rates, times every kernel of two layers of Llama2-7B against
its floor, before and after tuning and beside what the vendor's libraries take, measures a few points of the chart and
how long compiling takes, and says which of the project's targets that meets. Each part is a process of its own with a
limit on its time; the result file is written after each, so that nothing is lost when the machine is.
``--scale tiny`` runs the same code on a tiny model, also on a CPU. Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import chart_tables, gpu_parts, gpu_results, machine, stored, targets
from benchmarks.chart_results import Chart
from benchmarks.gpu_results import Found, GpuCheck
from benchmarks.gpu_scales import SCALES, Scale
from benchmarks.options import command_line, known
from tilewright.cli import readable_errors
from tilewright.progress import Progress

ROOT = Path(__file__).parent.parent
LEAST = 5.0
"""Seconds below which no part is begun."""
console = Console(width=140)


@readable_errors
def main(
    scale: Annotated[str, typer.Option(help="paper, or tiny to try the command anywhere.")] = "paper",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(min=0.1, help="End after this time; parts that do not fit are stopped or left out."),
    ] = 8.5,
    parts: Annotated[
        str,
        typer.Option(help=f"Some of the parts, separated by commas: {'; '.join(SCALES['paper'].seconds)}."),
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="Result file instead of one in benchmarks/results.")
    ] = None,
    show: Annotated[Path | None, typer.Option(help="Measure nothing; print what this file holds.")] = None,
) -> None:
    """Run every part and write what they gave; exit status 1 where one failed."""
    if show is not None:
        _show(stored.of_file(GpuCheck, show))
        return
    deadline = time.monotonic() + 60 * minutes
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that a part ends with us, in its session of its own
    (name,) = known("--scale", scale, tuple(SCALES))[:1]
    plan, target = SCALES[name], torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    facts = machine.describe(target)
    now = stored.now()
    empty = GpuCheck(now, command_line("benchmarks.gpu_check"), name, facts, machine.versions())
    check = Check(plan, target.type, deadline, empty, output or stored.place(empty))
    for part in _chosen(parts, plan):
        check.part(part)
    _show(check.result)
    console.print(f"stored in {check.file}", highlight=False)
    if check.result.failed:
        raise typer.Exit(1)


def _chosen(parts: str, plan: Scale) -> list[str]:
    """In the plan's order, as later parts go on with what earlier ones wrote. Some names have a comma in them."""
    text = parts.replace(",torch.compile", ";torch.compile").replace(", torch.compile", ";torch.compile")
    names = {name.replace(", ", ";"): name for name in plan.seconds}
    given = known("--parts", text, tuple(names)) if parts else list(names)
    return [name for key, name in names.items() if key in given]


def _show(check: GpuCheck) -> None:
    chart = check.found.chart
    rows = (*gpu_results.tables(check), *(chart_tables.tables(chart) if chart else ()))
    for table in (*rows, *targets.tables(targets.of_check(check), check.scale)):
        console.print(table.rich())
    for name, said in check.parts.items():
        console.print(f"{name}: {said}", highlight=False, markup=False)


@dataclass
class Check:
    """Runs parts and keeps what they find in ``file``. deadline: by ``time.monotonic``."""

    plan: Scale
    device: str
    deadline: float
    result: GpuCheck
    file: Path

    def part(self, name: str) -> None:
        """Run a part within its time, and write what it found, even if it was stopped or failed."""
        seconds = min(self.plan.seconds[name], self.deadline - time.monotonic())
        if seconds < LEAST:
            self._keep(name, Found(), "left out, the time is over")
            return
        run: dict[str, Callable[[float], tuple[Found, str]]] = {
            "tests": self.tests,
            "chart": lambda limit: self.chart(self.plan.chart, limit),
            "chart, torch.compile": lambda limit: self.chart(self.plan.rivals, limit),
        }
        with Progress().step(f"{name.capitalize()}, at most {seconds:.0f} s"):
            try:
                found, said = run.get(name, lambda limit: self.process(name, limit))(seconds)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong on a new machine, the other parts tell more
                found, said = Found(), f"failed: {type(error).__name__}: {str(error).strip()[:200]}"
        self._keep(name, found, said)

    def tests(self, limit: float) -> tuple[Found, str]:
        """pytest's summary of tests/gpu, and the names of those that failed, also where time ended them."""
        command = [sys.executable, "-m", "pytest", "-v", "--maxfail=5", "-p", "no:cacheprovider", "tests/gpu"]
        if find_spec("xdist") is not None:
            command += ["-n", str(min(16, os.cpu_count() or 1))]  # most of it is compiling
        done = ended(command, limit)
        said = _last_line(done.output).strip("= ") or "nothing printed"
        if done.status in (0, 5):
            return Found(), said
        return Found(), "; ".join((f"failed{done.why}: {said}", *_failed_tests(done.output)))

    def process(self, name: str, limit: float) -> tuple[Found, str]:
        """A part of ``gpu_parts``."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "part.json"
            module = [sys.executable, "-m", "benchmarks.gpu_parts", name, "--into", str(file)]
            done = ended([*module, "--scale", self.result.scale, "--device", self.device], limit)
            found, said = gpu_parts.read(file)
        return found, said if not done.status else f"failed{done.why}: {_last_line(done.output)}"

    def chart(self, arguments: Sequence[str], limit: float) -> tuple[Found, str]:
        """Some points of the chart, which go on with those of this result, and which a limit cuts between points."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "chart.json"
            if self.result.found.chart is not None:
                stored.save(self.result.found.chart, file)
            command = [sys.executable, "-m", "benchmarks.chart", "--scale", self.result.scale, *arguments]
            command += ["--device", self.device, "--limit", str(self.plan.limit), "--output", str(file)]
            done = ended(command, limit)
            chart = stored.of_file(Chart, file) if file.exists() else None
        points, prompts = (len(chart.points), len(chart.prompts)) if chart else (0, 0)
        said = f"{points} points and {prompts} prompts so far"
        if chart is not None and chart.left_out:
            said += "; left out: " + "; ".join(str(missing) for missing in chart.left_out)
        return Found(
            chart=chart
        ), said if not done.status else f"failed{done.why}: {said}. {_last_line(done.output)}"

    def _keep(self, name: str, found: Found, said: str) -> None:
        found = merged(self.result.found, found)
        self.result = replace(self.result, found=found, parts={**self.result.parts, name: said})
        stored.save(self.result, self.file)


def merged(old: Found, new: Found) -> Found:
    """Both, where one of them has something; lists one behind the other."""
    pairs = {f.name: (getattr(old, f.name), getattr(new, f.name)) for f in fields(Found)}
    return Found(**{n: (*a, *b) if isinstance(a, tuple) else b or a for n, (a, b) in pairs.items()})


@dataclass(frozen=True)
class Ended:
    """A process that is over. output: stdout and stderr together. why: " by its time limit" or nothing."""

    status: int
    output: str
    why: str = ""


def ended(command: Sequence[str], limit: float) -> Ended:
    """Run a command in the project's folder; after ``limit`` seconds stop it and all that it started."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # no part needs a hub, and none should wait for one
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        return Ended(process.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Ended(process.returncode or 1, output, f", stopped after {limit:.0f} s")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def _failed_tests(output: str) -> list[str]:
    """The tests that pytest's verbose output says failed, with or without a summary at its end."""
    found = re.findall(r"(?m)^(?:\[gw\d+\].*?FAILED (\S+)|FAILED (\S+)|(\S+::\S+) FAILED)", output)
    return list(dict.fromkeys(next(filter(None, names)) for names in found))


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


if __name__ == "__main__":
    typer.run(main)
