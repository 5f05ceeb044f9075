"""The chart of the field: three models over batch sizes and contexts, ours beside what a user would pick today.

``python -m benchmarks.chart`` draws what FlashDecoding++ (arXiv 2311.01282) drew: Llama2-7B, Llama2-13B and OPT-6.7B
(random weights in their real shapes) against Hugging Face, over contexts by batch. Every point is written as soon as it
is measured, and a later run goes on with what is missing, as a GPU may be at hand for ten minutes at a time.
``--scale tiny`` runs the same code on tiny models, anywhere, in a minute or two.
"""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import tilewright as tw
from benchmarks import chart_picture, chart_results, machine, models, stored
from benchmarks.build import our_bytes
from benchmarks.chart_results import FORMS, Chart, Point
from benchmarks.large_models import BUILDERS, TINY, with_random_values
from benchmarks.measure import Task, measure
from benchmarks.options import command_line, known
from benchmarks.probe import device_probe
from benchmarks.results import DECODE, EAGER, FIRST_TOKEN, TORCH_COMPILE
from benchmarks.subject import Subject
from benchmarks.system import LeftOut, System
from benchmarks.torch_compile import TorchCompile
from tilewright.cli import readable_errors
from tilewright.errors import TilewrightError
from tilewright.progress import Progress
from tilewright.runtime.cuda_graph import recorded_bytes

SHORT_NAMES = {"eager": EAGER, "torch.compile": TORCH_COMPILE} | {f: name for name, f in FORMS.items()}
notes = Console(stderr=True)


@dataclass(frozen=True)
class Scale:
    """models, and contexts by batch. first_token: contexts at which batch 1 is also timed to its first token."""

    models: tuple[str, ...]
    contexts: dict[int, tuple[int, ...]]
    first_token: tuple[int, ...]
    tokens: int

    @property
    def positions(self) -> int:
        """Room that the longest point needs."""
        return max(max(sizes) for sizes in self.contexts.values()) + 2 * self.tokens + 8


SCALES = {
    "paper": Scale(
        tuple(BUILDERS),
        {1: (128, 1024, 2048, 8192), 2: (128, 1024, 4096), 4: (128, 1024, 2048), 8: (128, 1024, 4096)},
        first_token=(128, 1024, 4096),
        tokens=64,
    ),
    "tiny": Scale(tuple(TINY), {1: (16, 48), 2: (16,)}, first_token=(16,), tokens=6),
}


@readable_errors
def main(
    scale: Annotated[str, typer.Option(help="paper, or tiny to try the command anywhere.")] = "paper",
    models_: Annotated[
        str, typer.Option("--models", help="Some of the scale's models, separated by commas.")
    ] = "",
    systems: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(SHORT_NAMES)}, separated by commas; torch.compile takes long. A point that lacks one of "
            "them is measured anew, with these and those that it has."
        ),
    ] = ",".join(SHORT_NAMES),
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each system per point.")] = 3,
    minutes: Annotated[
        float, typer.Option(min=0, help="Begin no point later than this; 0 for no limit.")
    ] = 0.0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is there already.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Result file instead of one in benchmarks/results.")
    ] = None,
) -> None:
    """Measure what is missing of the chart, write it point by point, and draw it."""
    (name,) = known("--scale", scale, tuple(SCALES))[:1]
    plan = SCALES[name]
    wanted = known("--models", models_ or ",".join(plan.models), plan.models)
    chosen = [SHORT_NAMES[s] for s in known("--systems", systems, tuple(SHORT_NAMES))]
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    file, chart = _begin(name, target, output, fresh)
    run = _Run(
        file, chart, plan, chosen, target, repeats, time.monotonic() + 60 * minutes if minutes else None
    )
    for model in wanted:
        run.model(model)
    notes.print(f"stored in {run.file}", highlight=False)
    try:
        picture = chart_picture.draw(run.chart, run.file.with_suffix(".svg"))
        notes.print(f"picture in {picture}", highlight=False)
    except LeftOut as error:
        notes.print(f"[yellow]no picture[/yellow] {error}", highlight=False)


def _begin(scale: str, device: torch.device, output: Path | None, fresh: bool) -> tuple[Path, Chart]:
    """The chart to go on with and its file: the newest of this device, or an empty one."""
    facts = machine.describe() | {"device": machine.device_name(device)}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    empty = Chart(now, command_line("benchmarks.chart"), scale, facts, machine.versions())
    if output is not None and output.exists() and not fresh:
        return output, stored.from_json(Chart, output.read_text())
    found = None if fresh or output else chart_results.newest(scale, facts["device"])
    return found or (output or stored.place(empty), empty)


@dataclass
class _Run:
    """Adds points to a chart and writes it after each. deadline: by ``time.monotonic``."""

    file: Path
    chart: Chart
    plan: Scale
    systems: Sequence[str]
    device: torch.device
    repeats: int
    deadline: float | None

    def model(self, name: str) -> None:
        """Every missing point of one model."""
        missing = [
            (batch, context)
            for batch, sizes in self.plan.contexts.items()
            for context in sizes
            if self._lacks(name, batch, context)
        ]
        if not missing or self._late():
            return
        with self._built(name, self._wanted(name, missing)) as systems:
            for batch, context in missing:
                if self._late():
                    notes.print("[yellow]out of time[/yellow]; run again to go on", highlight=False)
                    return
                able = {n: build(batch) for n, build in systems.items()}
                self.chart = self.chart.with_point(self._point(name, batch, context, able))
                stored.save(self.chart, self.file)

    def _wanted(self, name: str, missing: Sequence[tuple[int, int]]) -> list[str]:
        """The systems that were asked for, and those of points to be measured anew: ratios are of one run."""
        points = [self.chart.point(name, *key) for key in missing]
        there = {s for s in chart_results.SYSTEMS for p in points if p is not None and p.decode.of(s)}
        return [s for s in chart_results.SYSTEMS if s in there or s in self.systems]

    def _lacks(self, name: str, batch: int, context: int) -> bool:
        point = self.chart.point(name, batch, context)
        return point is None or any(
            point.decode.of(s) is None and not self._is_left_out(name, s) for s in self.systems
        )

    def _is_left_out(self, model: str, system: str) -> bool:
        return any(line.startswith(f"{model}, {system}:") for line in self.chart.left_out)

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    @contextmanager
    def _built(self, name: str, wanted: Sequence[str]) -> Iterator[dict[str, Callable[[int], System]]]:
        """Each system of a model, as a function of the batch; freed at the end of the block."""
        with Progress().step(f"Making {name}"):
            source = with_random_values(name, self.device, self.plan.positions)
        makers: dict[str, Callable[[int], System]] = {}
        for system in wanted:
            try:
                makers[system] = self._maker(source, system)
            except (TilewrightError, torch.OutOfMemoryError) as error:
                line = f"{name}, {system}: {str(error).splitlines()[0]}"
                notes.print(f"[yellow]left out[/yellow] {line}", highlight=False)
                self.chart = replace(self.chart, left_out=tuple(dict.fromkeys((*self.chart.left_out, line))))
        try:
            yield makers
        finally:
            makers.clear()
            del source
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _maker(self, source: Any, system: str) -> Callable[[int], System]:
        if system == EAGER:
            return lambda batch: Subject(
                EAGER, source, lambda context: models.bytes_per_step(source, context, batch), batch
            )
        if system == TORCH_COMPILE:
            return partial(TorchCompile, source)
        form = FORMS[system]
        fast = tw.compile(
            source,
            batch_sizes=tuple(self.plan.contexts),
            max_length=self.plan.positions,
            weights=models.PRECISIONS[form].weights,
            progress=Progress(),
        )
        return lambda batch: Subject(system, fast, partial(our_bytes, fast, source, form, batch), batch)

    def _point(self, name: str, batch: int, context: int, systems: dict[str, System]) -> Point:
        tokens = self.plan.tokens
        generator = torch.Generator().manual_seed(context)
        ids = torch.randint(3, 2000, (1, context), generator=generator).to(self.device)
        first = batch == 1 and context in self.plan.first_token
        total = (1 + first) * (len(systems) + self.repeats)
        with Progress().step(f"{name}, batch {batch}, context {context}", total=total) as advance:
            with device_probe(self.device) as probe:
                everyone = list(systems.values())
                task = Task(DECODE, context, tokens, ids)
                decode = measure(task, "bf16", everyone, probe, self.repeats, advance)
                able = [s for s in everyone if FIRST_TOKEN in s.tasks]
                task = Task(FIRST_TOKEN, context, 1, ids)
                first_token = measure(task, "bf16", able, probe, self.repeats, advance) if first else None
            peaks = {s.name: peak for s in everyone if (peak := self._peak(s, ids))}
        for system in everyone:
            system.close()
        arenas = {
            n: s.model.report().arena_bytes
            for n, s in systems.items()
            if n in FORMS and isinstance(s, Subject)
        }
        commit = machine.versions().get("commit", "")
        return Point(name, batch, context, decode, first_token, peaks, arenas, recorded_bytes(), commit)

    def _peak(self, system: System, ids: torch.Tensor) -> int:
        """Most bytes of device memory while a system decodes; 0 without a GPU."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        system.decode(ids, 2)
        return int(torch.cuda.max_memory_allocated(self.device))


if __name__ == "__main__":
    typer.run(main)
