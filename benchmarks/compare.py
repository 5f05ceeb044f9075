"""What got slower between two result files: ``python -m benchmarks.compare before.json after.json``.

Machines differ from hour to hour, so each figure is first set against something measured beside it in the same run:
decoding against the time that its bytes take at the probe's bandwidth, a kernel against the time that its bytes or
FLOPs take at the measured peaks, everything else against Hugging Face eager. What is compared is how that ratio of ours
changed. Files are of six kinds: speed (``benchmarks.cpu``), encoders, serving, speculation, chart, and the check of a
GPU. Of speculation it is what guesses save: ours with them beside ours without.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import serving_results, speculation_results, stored
from benchmarks.chart_results import Chart
from benchmarks.encoder_results import EncoderResults
from benchmarks.gpu_results import GpuCheck
from benchmarks.results import EAGER, OURS, Measure, Results
from benchmarks.samples import Spread, pair_ratios
from benchmarks.serving_results import ServingResults
from benchmarks.speculation_results import SpeculationResults
from tilewright.cli import readable_errors
from tilewright.errors import OptionError

console = Console(width=120)


@dataclass(frozen=True)
class Standing:
    """How one system stands at one task: its speed over that of ``beside``, median and quartiles."""

    what: str
    system: str
    beside: str
    value: Spread


@dataclass(frozen=True)
class Change:
    """A standing in both runs. ratio: after over before, below 1 where it got slower. certain: whether the quartiles
    of the two do not overlap."""

    before: Standing
    after: Standing

    @property
    def ratio(self) -> float:
        return self.after.value.median / self.before.value.median

    @property
    def certain(self) -> bool:
        a, b = self.before.value, self.after.value
        return a.high < b.low or b.high < a.low


def standings(file: Path) -> dict[tuple[str, str], Standing]:
    """Every standing of ours in a result file, by task and system. Raises OptionError for a file that is none."""
    try:
        text = file.read_text()
        kind = json.loads(text).get("kind")
        if kind == Results.KIND:
            speed = stored.from_json(Results, text)
            found = [s for m in speed.measures for s in _of(f"{m.task} {m.size}, {m.precision}", m)]
        elif kind == Chart.KIND:
            found = _of_chart(stored.from_json(Chart, text))
        elif kind == EncoderResults.KIND:
            found = list(_of_encoders(stored.from_json(EncoderResults, text)))
        elif kind == ServingResults.KIND:
            found = list(_of_servers(stored.from_json(ServingResults, text)))
        elif kind == SpeculationResults.KIND:
            found = list(_of_questions(stored.from_json(SpeculationResults, text)))
        elif kind == GpuCheck.KIND:
            check = stored.from_json(GpuCheck, text)
            found = [*_of_kernels(check), *(_of_chart(check.found.chart) if check.found.chart else ())]
        else:
            raise OptionError(
                f"{file} holds a result of kind {kind}; compare speed, encoders, serving, speculation, chart or "
                "gpu-check results"
            )
    except OptionError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise OptionError(f"{file} is no result file: {error}") from error
    return {(s.what, s.system): s for s in found if s.system.startswith(OURS)}


def _of_chart(chart: Chart) -> list[Standing]:
    return [
        s
        for e in (*chart.points, *chart.prompts)
        for m in e.measures
        for s in _of(f"{e.model} {m.task}, batch {max(e.key[1], 1)}, {m.size} tokens", m)
    ]


def _of_kernels(check: GpuCheck) -> Iterator[Standing]:
    """Shares of the floor, a sample per run."""
    for kernel in check.found.kernels:
        if (floor := check.floor(kernel)) and all(kernel.seconds):
            what = f"kernel {kernel.program}{', tuned' if kernel.tuned else ''}: {kernel.kernel}"
            yield Standing(what, OURS, "floor", Spread.of([floor / s for s in kernel.seconds]))


def _of_servers(run: ServingResults) -> Iterator[Standing]:
    for load in run.loads:
        ours, other = load.of(OURS), load.of(serving_results.EAGER)
        if ours is not None and other is not None:
            ratio = Spread.of(pair_ratios(ours.rates, other.rates))
            yield Standing(load.what, OURS, serving_results.EAGER, ratio)


def _of_questions(run: SpeculationResults) -> Iterator[Standing]:
    """With guesses beside without: what plain decoding gains or loses, ``benchmarks.cpu`` says."""
    for question in run.questions:
        ours, plain = question.of(speculation_results.OURS_GUESSING), question.of(OURS)
        if ours is not None and plain is not None:
            ratio = Spread.of(pair_ratios(ours.rates, plain.rates))
            yield Standing(question.what, ours.system, OURS, ratio)


def _of_encoders(run: EncoderResults) -> Iterator[Standing]:
    for batch in run.batches:
        eager, ours = batch.of(EAGER), batch.of(OURS)
        if eager is not None and ours is not None:
            yield Standing(batch.what, OURS, EAGER, batch.ratio(ours, eager))


def _of(what: str, measure: Measure) -> Iterator[Standing]:
    eager = measure.of(EAGER)
    for series in measure.series:
        name = series.system + (f", batch {series.batch}" if series.batch > 1 else "")
        if series.bytes_per_step:
            yield Standing(what, name, "floor", measure.share_of_probe(series))
        elif eager is not None and series is not eager:
            yield Standing(what, name, EAGER, measure.ratio(series, eager))


def changes(before: Path, after: Path) -> list[Change]:
    """What both files have, the largest loss first. Raises OptionError where they have nothing in common."""
    old, new = standings(before), standings(after)
    found = [Change(old[key], new[key]) for key in old if key in new]
    if not found:
        raise OptionError(f"{before} and {after} have no task and system in common")
    return sorted(found, key=lambda change: change.ratio)


@readable_errors
def main(
    before: Annotated[Path, typer.Argument(help="Result file to start from.")],
    after: Annotated[Path, typer.Argument(help="Result file to hold against it.")],
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="Loss from which a change counts as slower.")
    ] = 0.05,
) -> None:
    """Print what changed, slowest first; exit status 1 where something got slower beyond doubt."""
    found = changes(before, after)
    table = Table(title=f"{after.name} over {before.name}, each against its own run", title_justify="left")
    for column in ("task", "system", "against", "before", "after", "after / before", ""):
        table.add_column(
            column, justify="right" if column in ("before", "after", "after / before") else "left"
        )
    slower = [c for c in found if c.ratio < 1 - tolerance and c.certain]
    for change in found:
        verdict = "slower" if change in slower else "" if change.certain else "within quartiles"
        a, b = change.before.value.median, change.after.value.median
        table.add_row(
            change.before.what, change.before.system, change.before.beside, f"{a:.3f}", f"{b:.3f}",
            f"{change.ratio:.3f}", verdict,
        )  # fmt: skip
    console.print(table)
    if slower:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
