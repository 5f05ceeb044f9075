"""What the chart is drawn from: one point per model, batch and context, each with all systems measured in turns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import stored
from benchmarks.results import EAGER, OURS, TORCH_COMPILE, Measure, Series
from benchmarks.samples import Spread
from benchmarks.step_gaps import StepGap
from benchmarks.stored import records

FORMS = {f"{OURS} bf16": "bf16", f"{OURS} int8": "int8", f"{OURS} int4": "int4"}
"""Our systems by name, and the form of their weights."""

SYSTEMS = (EAGER, TORCH_COMPILE, *FORMS)
"""In the order of bars."""

Key = tuple[str, int, int]
"""Model, batch and context of a point; a prompt has batch 0 and its length."""


@dataclass(frozen=True)
class Point:
    """A model at a batch and a context.

    decode: its probe is the device's read bandwidth. peak_bytes: by system, the most memory that was allocated while it
    ran the context and decoded, above its weights and whatever else was there before: KV state, activations, our arena.
    arena_bytes: ours, planned. graph_bytes: device memory in the pools of our recordings (CUDA graphs), of all our
    systems together. commit: of the code that measured.
    """

    model: str
    batch: int
    context: int
    decode: Measure
    peak_bytes: dict[str, int]
    arena_bytes: dict[str, int]
    graph_bytes: int
    date: str
    commit: str

    @property
    def key(self) -> Key:
        return self.model, self.batch, self.context

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (self.decode,)

    def speedup(self, system: str) -> Spread | None:
        """Tokens per second over those of Hugging Face eager, round by round."""
        return ratio(self.decode, system, EAGER)

    def rate(self, system: str) -> Spread | None:
        """Tokens per second, all sequences together."""
        series = self.decode.of(system)
        return Spread.of(self.decode.rates(series)) if series else None

    def share_of_floor(self, system: str) -> Spread | None:
        """The time that the bytes of a step would take at the probe's bandwidth, over the time that it took."""
        series = self.decode.of(system)
        return self.decode.share_of_probe(series) if series and series.bytes_per_step else None


@dataclass(frozen=True)
class Prompt:
    """A model and one prompt of ``size`` tokens: the time to its first token from ``generate``, and, at some sizes,
    its forward alone (prefill), which torch.compile takes part in."""

    model: str
    size: int
    first_token: Measure
    prefill: Measure | None
    date: str
    commit: str

    @property
    def key(self) -> Key:
        return self.model, 0, self.size

    @property
    def measures(self) -> tuple[Measure, ...]:
        return tuple(m for m in (self.first_token, self.prefill) if m is not None)


@dataclass(frozen=True)
class Gap:
    """What lies between the decode steps of one system on a model."""

    model: str
    system: str
    gap: StepGap


@dataclass(frozen=True)
class Missing:
    """A system that gave nothing, and the reason: at one point or prompt; with context 0 at none of its batch; with
    batch 0 as well, nowhere on the model."""

    model: str
    batch: int
    context: int
    system: str
    reason: str

    def covers(self, key: Key, system: str) -> bool:
        """Whether this is why a point or prompt lacks a system. What cannot be built for batch 1 has no prompts."""
        model, batch, context = key
        return (self.model, self.system) == (model, system) and (self.batch, self.context) in (
            (batch, context),
            (max(batch, 1), 0),
            (0, 0),
        )

    @property
    def where(self) -> str:
        """``batch 1, context 128``."""
        if not self.context:
            return f"batch {self.batch}" if self.batch else "all points"
        return f"batch {self.batch}, context {self.context}" if self.batch else f"prompt of {self.context}"

    def __str__(self) -> str:
        return f"{self.model}, {self.where}, {self.system}: {self.reason}"


@dataclass(frozen=True)
class Chart:
    """All points that one device has given so far; a run adds what is missing.

    date: when it was begun. command: that of every run, in order. left_out: what could not be measured.
    """

    KIND: ClassVar[str] = "chart"
    SCHEMA: ClassVar[int] = 3
    COMMAND: ClassVar[str] = "python -m benchmarks.chart"

    date: str
    command: str
    scale: str
    machine: dict[str, Any]
    versions: dict[str, str]
    points: tuple[Point, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    gaps: tuple[Gap, ...] = ()
    left_out: tuple[Missing, ...] = ()

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Chart:
        """The run that plain data describes. Raises KeyError or TypeError where something is missing."""
        points = (Point(**row | {"decode": _measure(row["decode"])}) for row in data["points"])
        prompts = (
            Prompt(**row | {name: _measure(row[name]) for name in ("first_token", "prefill")})
            for row in data["prompts"]
        )
        gaps = (Gap(**row | {"gap": StepGap(**row["gap"])}) for row in data["gaps"])
        made = {
            "points": tuple(points),
            "prompts": tuple(prompts),
            "gaps": tuple(gaps),
            "left_out": records(Missing, data["left_out"]),
        }
        return cls(**data | made)

    @property
    def days(self) -> str:
        """The day, or the first and the last, on which it was measured."""
        days = sorted({e.date[:10] for e in (*self.points, *self.prompts)} or {self.date[:10]})
        return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"

    @property
    def commits(self) -> str:
        """Of the code that measured, in the order in which it did."""
        entries = sorted((*self.points, *self.prompts), key=lambda entry: entry.date)
        found = dict.fromkeys(entry.commit for entry in entries if entry.commit)
        return ", ".join(found) or self.versions.get("commit", "")

    def point(self, model: str, batch: int, context: int) -> Point | None:
        """The point, if it was measured."""
        return next((p for p in self.points if p.key == (model, batch, context)), None)

    def prompt(self, model: str, size: int) -> Prompt | None:
        """The prompt, if it was measured."""
        return next((p for p in self.prompts if p.key == (model, 0, size)), None)

    def having(self, new: Point | Prompt | Gap) -> Chart:
        """With something added, or measured anew."""
        if isinstance(new, Point):
            return replace(self, points=(*(p for p in self.points if p.key != new.key), new))
        if isinstance(new, Prompt):
            return replace(self, prompts=(*(p for p in self.prompts if p.key != new.key), new))
        others = (g for g in self.gaps if (g.model, g.system) != (new.model, new.system))
        return replace(self, gaps=(*others, new))

    def joined(self, other: Chart) -> Chart:
        """With all that another chart of the same device and versions has, which replaces what is here of it."""
        chart = replace(self, command=together(self.command, other.command))
        for new in (*other.points, *other.prompts, *other.gaps):
            chart = chart.having(new)
        for missing in other.left_out:
            chart = chart.lacking(missing)
        return chart

    def lacking(self, missing: Missing) -> Chart:
        """With one thing more that could not be measured."""
        return replace(self, left_out=tuple(dict.fromkeys((*self.left_out, missing))))


def together(*commands: str) -> str:
    """Commands of several runs, each once, in order."""
    return "; ".join(dict.fromkeys(command for text in commands for command in text.split("; ")))


def ratio(measure: Measure, system: str, other: str) -> Spread | None:
    """How many times as fast a system is as another, round by round; None unless both were measured."""
    one, two = measure.of(system), measure.of(other)
    return measure.ratio(one, two) if one and two else None


def _measure(row: dict[str, Any] | None) -> Any:
    if row is None:
        return None
    (measure,) = records(Measure, [row | {"series": records(Series, row["series"])}])
    return measure


def newest(scale: str, device: str, folder: Path = stored.FOLDER) -> tuple[Path, Chart] | None:
    """The latest chart of a device at a scale, and its file; None when there is none."""
    found = (pair for pair in latest(scale, folder) if pair[1].machine["device"] == device)
    return next(found, None)


def latest(scale: str, folder: Path = stored.FOLDER) -> list[tuple[Path, Chart]]:
    """The latest chart of each device at a scale, and its file, by the device's name."""
    return stored.latest(Chart, scale, folder)
