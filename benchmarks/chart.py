"""The chart of the field: three models over batch sizes and contexts, ours beside what a user would pick today.

``python -m benchmarks.chart`` draws what FlashDecoding++ (arXiv 2311.01282) drew: Llama2-7B, Llama2-13B and OPT-6.7B
(random weights in their real shapes) against Hugging Face, over contexts by batch. Every point is written as soon as it
is measured, and a later run goes on with what is missing, as a GPU may be at hand for ten minutes at a time.
``--scale tiny`` runs the same code on a tiny model, anywhere, in about a minute.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import chart_picture, chart_results, chart_tables, machine, stored, targets
from benchmarks.chart_results import FORMS, Chart
from benchmarks.chart_run import Run, Settings
from benchmarks.chart_scales import SCALES
from benchmarks.gpu_results import GpuCheck
from benchmarks.options import command_line, known
from benchmarks.results import EAGER, TORCH_COMPILE
from benchmarks.system import LeftOut
from tilewright.cli import readable_errors
from tilewright.errors import OptionError

SHORT_NAMES = {"eager": EAGER, "torch.compile": TORCH_COMPILE} | {f: name for name, f in FORMS.items()}
COMPARED = ("torch", "transformers", "triton", "python")
"""Versions that all points of a file share, as their figures are set beside each other."""
notes = Console(stderr=True)
console = Console(width=140)


@readable_errors
def main(
    scale: Annotated[str, typer.Option(help="paper, or tiny to try the command anywhere.")] = "paper",
    models_: Annotated[
        str,
        typer.Option(
            "--models", help="Some of the scale's models, separated by commas; tiny-opt is another of tiny."
        ),
    ] = "",
    systems: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(SHORT_NAMES)}, separated by commas; torch.compile takes long. A point that lacks one of "
            "them is measured anew, with these and those that it has."
        ),
    ] = ",".join(SHORT_NAMES),
    points: Annotated[
        str,
        typer.Option(
            help="Some of the scale's points, as batch:context, and of its prompts (first token and prefill at batch "
            "1), as prompt:length, separated by commas: 1:1024,prompt:4096."
        ),
    ] = "",
    torch_compile_at: Annotated[
        str,
        typer.Option(
            help="Points at which torch.compile takes part, as for --points, since it compiles anew for each one; by "
            "default all of them."
        ),
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each system per point.")] = 3,
    minutes: Annotated[
        float, typer.Option(min=0, help="Begin no point later than this; 0 for no limit.")
    ] = 0.0,
    limit: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds that a system may take to be built, and to get ready for a point (torch.compile compiles "
            "then); over that it is left out, with a note in the file.",
        ),
    ] = 180.0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is there already.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what was left out.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Result file instead of one in benchmarks/results.")
    ] = None,
    show: Annotated[
        Path | None, typer.Option(help="Measure nothing; print the tables of this file and draw its picture.")
    ] = None,
    add: Annotated[
        Path | None,
        typer.Option(
            help="Measure nothing; add the points of this chart, or GPU check, to the newest chart of its device."
        ),
    ] = None,
) -> None:
    """Measure what is missing of the chart, write it point by point, and draw it."""
    if show is not None:
        _show(stored.of_file(Chart, show), show)
        return
    if add is not None:
        _show(*_added(add))
        return
    (name,) = known("--scale", scale, tuple(SCALES))[:1]
    plan = SCALES[name].only(points)
    wanted = known("--models", models_ or ",".join(plan.models), (*plan.models, *plan.others))
    chosen = [SHORT_NAMES[s] for s in known("--systems", systems, tuple(SHORT_NAMES))]
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    file, chart = _begin(name, target, output, fresh)
    if retry:
        chart = replace(chart, left_out=())
    compiled = SCALES[name].only(torch_compile_at).sizes
    run = Run(file, chart, Settings(plan, chosen, target, repeats, limit, minutes or None, compiled))
    for model in wanted:
        run.model(model)
    notes.print(f"stored in {run.file}" if run.file.exists() else "nothing measured", highlight=False)
    _show(run.chart, run.file)


def _show(chart: Chart, file: Path) -> None:
    """The chart's tables, what it says of the targets, and its picture beside the file."""
    for rows in (*chart_tables.tables(chart), *targets.tables(targets.of_chart(chart), chart.scale)):
        console.print(rows.rich())
    try:
        picture = chart_picture.draw(chart, file.with_suffix(".svg"))
        notes.print(f"picture in {picture}", highlight=False)
    except LeftOut as error:
        notes.print(f"[yellow]no picture[/yellow] {error}", highlight=False)


def _begin(scale: str, device: torch.device, output: Path | None, fresh: bool) -> tuple[Path, Chart]:
    """The chart to go on with and its file: the newest of this device and these versions, or an empty one.

    Raises OptionError for a given file of another device, scale or versions: a chart is of one machine.
    """
    facts = machine.describe(device)
    now = stored.now()
    empty = Chart(now, command_line("benchmarks.chart"), scale, facts, machine.versions())
    if fresh:
        return output or stored.place(empty), empty
    if output is None:
        found = chart_results.newest(scale, facts["device"])
        if found is None or _difference(found[1], empty):
            return stored.place(empty), empty
        return found[0], _resumed(found[1], empty)
    if not output.exists():
        return output, empty
    chart = stored.of_file(Chart, output)
    if difference := _difference(chart, empty):
        raise OptionError(f"{output} was measured with {difference}; name another file, or give --fresh")
    return output, _resumed(chart, empty)


def _difference(old: Chart, new: Chart) -> str:
    """What forbids to add to a chart: ``scale paper instead of tiny``; empty where nothing does."""
    facts = [("scale", old.scale, new.scale), ("device", old.machine["device"], new.machine["device"])]
    facts += [(name, old.versions.get(name), new.versions.get(name)) for name in COMPARED]
    return ", ".join(f"{name} {a} instead of {b}" for name, a, b in facts if a != b)


def _resumed(old: Chart, new: Chart) -> Chart:
    return replace(old, command=chart_results.together(old.command, new.command))


def _points(file: Path) -> Chart:
    """A chart, or what a check of a GPU has of one. Raises OptionError for a check without a chart."""
    if stored.kind_of(file) == Chart.KIND:
        return stored.of_file(Chart, file)
    check = stored.of_file(GpuCheck, file)
    if check.found.chart is None:
        raise OptionError("the check has no points of the chart")
    return replace(check.found.chart, command=check.command)


def _added(file: Path) -> tuple[Chart, Path]:
    """The newest chart of a file's device and versions with the file's points, and where it is stored now. Raises
    OptionError for a file without points."""
    new = _points(file)
    found = chart_results.newest(new.scale, new.machine["device"])
    if found is None or _difference(found[1], new):
        return new, stored.save(new, stored.place(new))
    chart = found[1].joined(new)
    return chart, stored.save(chart, found[0])


if __name__ == "__main__":
    typer.run(main)
