"""What the chart is drawn from: one point per model, batch and context, each with all systems measured in turns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import stored
from benchmarks.results import EAGER, OURS, TORCH_COMPILE, Measure, Series
from benchmarks.samples import Spread
from benchmarks.stored import records

FORMS = {f"{OURS} bf16": "bf16", f"{OURS} int8": "int8", f"{OURS} int4": "int4"}
"""Our systems by name, and the form of their weights."""

SYSTEMS = (EAGER, TORCH_COMPILE, *FORMS)
"""In the order of bars."""


@dataclass(frozen=True)
class Point:
    """A model at a batch and a context. decode: its probe is the device's read bandwidth. first_token: of a prompt as
    long as the context, where that was asked for. peak_bytes: device memory that PyTorch had allocated at most while a
    system ran, by system; empty without a GPU. arena_bytes: ours, planned. graph_bytes: device memory in the pools of
    our recordings (CUDA graphs), of all our systems together. commit: of the code that measured."""

    model: str
    batch: int
    context: int
    decode: Measure
    first_token: Measure | None
    peak_bytes: dict[str, int]
    arena_bytes: dict[str, int]
    graph_bytes: int
    commit: str

    @property
    def key(self) -> tuple[str, int, int]:
        return self.model, self.batch, self.context

    def speedup(self, system: str) -> Spread | None:
        """Tokens per second over those of Hugging Face eager, round by round."""
        ours, eager = self.decode.of(system), self.decode.of(EAGER)
        return self.decode.ratio(ours, eager) if ours and eager else None

    def rate(self, system: str) -> Spread | None:
        """Tokens per second, all sequences together."""
        series = self.decode.of(system)
        return Spread.of(self.decode.rates(series)) if series else None

    def share_of_floor(self, system: str) -> Spread | None:
        """The time that the bytes of a step would take at the probe's bandwidth, over the time that it took."""
        series = self.decode.of(system)
        return self.decode.share_of_probe(series) if series and series.bytes_per_step else None


@dataclass(frozen=True)
class Chart:
    """All points that one device has given so far; a run adds what is missing.

    left_out: what could not be measured, with the reason.
    """

    KIND: ClassVar[str] = "chart"
    SCHEMA: ClassVar[int] = 2
    COMMAND: ClassVar[str] = "python -m benchmarks.chart"

    date: str
    command: str
    scale: str
    machine: dict[str, Any]
    versions: dict[str, str]
    points: tuple[Point, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Chart:
        """The run that plain data describes. Raises KeyError or TypeError where something is missing."""
        points = [
            row
            | {
                "decode": _measure(row["decode"]),
                "first_token": _measure(row["first_token"]) if row["first_token"] else None,
            }
            for row in data["points"]
        ]
        return cls(
            **data | {"points": tuple(Point(**row) for row in points), "left_out": tuple(data["left_out"])}
        )

    def point(self, model: str, batch: int, context: int) -> Point | None:
        """The point, if it was measured."""
        return next((p for p in self.points if p.key == (model, batch, context)), None)

    def with_point(self, point: Point) -> Chart:
        """With a point added, or measured anew."""
        return replace(self, points=(*(p for p in self.points if p.key != point.key), point))


def _measure(row: dict[str, Any]) -> Measure:
    (measure,) = records(Measure, [row | {"series": records(Series, row["series"])}])
    return measure


def newest(scale: str, device: str, folder: Path = stored.FOLDER) -> tuple[Path, Chart] | None:
    """The latest chart of a device at a scale, and its file; None when there is none."""
    found = (pair for pair in latest(scale, folder) if pair[1].machine["device"] == device)
    return next(found, None)


def latest(scale: str, folder: Path = stored.FOLDER) -> list[tuple[Path, Chart]]:
    """The latest chart of each device at a scale, and its file, by the device's name."""
    found: dict[str, tuple[Path, Chart]] = {}
    for file, chart in sorted(stored.all_of(Chart, folder), key=lambda pair: pair[1].date):
        if chart.scale == scale:
            found[chart.machine["device"]] = (file, chart)
    return [found[device] for device in sorted(found)]
