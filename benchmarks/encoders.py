"""One command that measures encoders of texts and images over batches: ``python -m benchmarks.encoders``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import encoder_models, machine, models, stored
from benchmarks.encoder_results import Batch, EncoderResults, table
from benchmarks.measure import in_turns
from benchmarks.models import PRECISIONS
from benchmarks.options import SYSTEMS, command_line, known
from benchmarks.results import OURS, TORCH_COMPILE, Series
from tilewright.cli import readable_errors
from tilewright.errors import OptionError, TilewrightError
from tilewright.progress import Advance, Progress
from tilewright.trials import wait

console = Console()
notes = Console(stderr=True)

SAMPLE = 0.05
"""Seconds that a sample lasts at least: short forwards are repeated."""


@readable_errors
def main(
    which: Annotated[
        str,
        typer.Option(
            "--models", help=f"Any of {', '.join(encoder_models.NAMES)} (to try it), separated by commas."
        ),
    ] = "minilm,bert,modernbert,vit",
    precisions: Annotated[
        str, typer.Option(help="Any of f32, bf16, int8, int4, separated by commas.")
    ] = "f32,bf16",
    systems: Annotated[
        str, typer.Option(help="Any of tilewright, eager, torch.compile, separated by commas.")
    ] = "tilewright,eager,torch.compile",
    batches: Annotated[
        str, typer.Option(help="Texts and tokens of each; of images, the numbers of texts.")
    ] = "1x16,1x128,8x128,32x16,1x512,8x512",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of every system.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each system per batch.")] = 7,
    backend: Annotated[
        str | None, typer.Option(help="Ours: cpp, triton or reference; by default the device's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Result file instead of one in benchmarks/results.")
    ] = None,
) -> None:
    """Measure encoders at each precision, run by all systems in turns, and store the samples."""
    torch.set_num_threads(threads)
    target = torch.device(device)
    names = known("--models", which, encoder_models.NAMES)
    chosen = known("--precisions", precisions, tuple(PRECISIONS))
    able = ("tilewright", "eager", "torch.compile")
    run = _Run(
        [SYSTEMS[name] for name in known("--systems", systems, able)],
        _points(batches),
        target,
        backend,
        repeats,
    )
    facts = machine.describe(target)
    machine.warn_if_busy(facts, notes)
    for name in names:
        for precision in chosen:
            run.side_by_side(name, precision)
    results = EncoderResults(
        date=stored.now(),
        command=command_line("benchmarks.encoders"),
        machine=facts,
        versions=machine.versions(),
        settings={"threads": threads},
        batches=tuple(run.batches),
        left_out=tuple(run.left_out),
    )
    console.print(table(results).rich())
    console.print(f"stored in {stored.save(results, output)}", highlight=False)


def _points(text: str) -> list[tuple[int, int]]:
    """Texts and tokens of each batch. Raises OptionError for anything but a list such as ``1x128,8x16``."""
    pairs = [part.strip().split("x") for part in text.split(",")]
    if not all(len(pair) == 2 and all(n.isdecimal() and int(n) > 0 for n in pair) for pair in pairs):
        raise OptionError(f"--batches: '{text}' is no list of batches; write for example 1x128,8x16")
    return [(int(rows), int(tokens)) for rows, tokens in pairs]


@dataclass
class _Run:
    systems: list[str]
    points: list[tuple[int, int]]
    device: torch.device
    backend: str | None
    repeats: int
    batches: list[Batch] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def side_by_side(self, name: str, precision: str) -> None:
        """All batches of one model at one precision."""
        source = encoder_models.load(name, precision).to(self.device)  # type: ignore[arg-type]
        images = encoder_models.takes_images(source)
        points = [(rows, 0 if images else tokens) for rows, tokens in self.points]
        points = list(dict.fromkeys(points))
        callees = self._callees(source, name, precision)
        if not callees:
            return
        total = len(points) * (len(callees) + self.repeats)
        with Progress().step(f"Measuring {name}, {precision}", total=total) as advance:
            for rows, tokens in points:
                given = encoder_models.inputs(source, rows, tokens)
                seconds = self._samples(callees, given, f"{rows}x{tokens or 'image'}", advance)
                series = tuple(Series(system, s, rows) for system, s in zip(callees, seconds, strict=True))
                self.batches.append(Batch(name, precision, tokens, series))
        torch._dynamo.reset()

    def _callees(self, source: Any, name: str, precision: str) -> dict[str, Callable[..., Any]]:
        """What to call of each system."""
        found: dict[str, Callable[..., Any]] = {}
        for system in self.systems:
            if system == OURS:
                options = {"max_length": max(tokens for _, tokens in self.points), "backend": self.backend}
                try:
                    found[system] = models.compiled(source, precision, progress=Progress(), **options)
                except TilewrightError as error:
                    self.left_out.append(f"{name}, {precision}: {error}")
                    notes.print(f"[yellow]left out[/yellow] {self.left_out[-1]}", highlight=False)
            elif PRECISIONS[precision].weights is None:  # else there is no such model to run
                found[system] = torch.compile(source, dynamic=False) if system == TORCH_COMPILE else source
        return found

    def _samples(
        self, callees: dict[str, Callable[..., Any]], given: dict[str, Any], what: str, advance: Advance
    ) -> list[tuple[float, ...]]:
        """Seconds of one forward, by system; each has run before."""
        runs = []
        for system, callee in callees.items():
            advance(f"{what}, {system} warms up")
            _seconds(callee, given, 1, self.device)
            calls = 1 + int(SAMPLE / _seconds(callee, given, 1, self.device))
            runs.append(lambda callee=callee, calls=calls: _seconds(callee, given, calls, self.device))
        return in_turns(runs, self.repeats, lambda: advance(what))


@torch.no_grad()
def _seconds(callee: Callable[..., Any], given: dict[str, Any], calls: int, device: torch.device) -> float:
    """Seconds of one of ``calls`` forwards."""
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        callee(**given)
    wait(device)
    return (time.perf_counter() - start) / calls


def run() -> None:
    """The command line."""
    typer.run(main)


if __name__ == "__main__":
    run()
