"""What one run of the benchmark of encoders measured, and its table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import stored
from benchmarks.results import OURS, SYSTEMS, Series
from benchmarks.rows import NOTHING, Rows, quartiles, times
from benchmarks.samples import Spread, pair_ratios
from benchmarks.stored import records


@dataclass(frozen=True)
class Batch:
    """Samples of one batch at one precision, those of all systems taken in turns.

    tokens: of each text; 0 for images. series: their ``batch`` is the number of texts or images, their seconds are
    those of one forward.
    """

    model: str
    precision: str
    tokens: int
    series: tuple[Series, ...]

    def of(self, system: str) -> Series | None:
        """The samples of a system, if it was measured."""
        return next((s for s in self.series if s.system == system), None)

    def ratio(self, ours: Series, other: Series) -> Spread:
        """How many times as fast ``ours`` is, round by round."""
        return Spread.of(pair_ratios(other.seconds, ours.seconds))

    @property
    def what(self) -> str:
        """``bert, 8 texts of 128 tokens, bf16``."""
        rows = self.series[0].batch
        several = f"{rows} texts of {self.tokens} tokens" if self.tokens else f"{rows} images"
        one = f"text of {self.tokens} tokens" if self.tokens else "image"
        return f"{self.model}, {one if rows == 1 else several}, {self.precision}"


@dataclass(frozen=True)
class EncoderResults:
    """One run. left_out: what was asked for and could not be measured, with the reason."""

    KIND: ClassVar[str] = "encoders"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "python -m benchmarks.encoders"

    date: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    batches: tuple[Batch, ...]
    left_out: tuple[str, ...] = ()

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> EncoderResults:
        """The run that plain data describes. Raises KeyError or TypeError where something is missing."""
        batches = [row | {"series": records(Series, row["series"])} for row in data["batches"]]
        lists = {"batches": records(Batch, batches), "left_out": tuple(data["left_out"])}
        return cls(**data | lists)


def table(found: EncoderResults) -> Rows:
    """All systems, per model, batch and precision; each of the others with how many times as fast ours is."""
    columns = [name for name in SYSTEMS if any(b.of(name) for b in found.batches)]
    rows = tuple((b.what, *(_rate(b, name) for name in columns)) for b in found.batches)
    title = (
        "Texts or images per second, medians with quartiles in parentheses; below those of the other systems, how many "
        "times as fast tilewright is"
    )
    return Rows(title, ("", *columns), rows)


def _rate(batch: Batch, system: str) -> str:
    series, ours = batch.of(system), batch.of(OURS)
    if series is None:
        return NOTHING
    text = quartiles(Spread.of([series.batch / s for s in series.seconds]))
    if ours is None or system == OURS:
        return text
    return f"{text}\n{times(batch.ratio(ours, series))}"


def latest(folder: Path = stored.FOLDER) -> list[EncoderResults]:
    """The latest stored run on each device, the newest first."""
    return [run for _, run in stored.newest_of_each(EncoderResults, "device", folder)]
