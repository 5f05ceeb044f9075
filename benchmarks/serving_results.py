"""What one run of the benchmark of servers measured, and its table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import stored
from benchmarks.results import OURS
from benchmarks.rows import NOTHING, Rows, quartiles, times
from benchmarks.samples import Spread, pair_ratios
from benchmarks.stored import records

EAGER, PAGED = "transformers serve", "transformers serve --continuous-batching"
SYSTEMS = (OURS, EAGER, PAGED)
"""Servers, in the order of tables."""


@dataclass(frozen=True)
class Served:
    """Samples of one server. Of each: seconds from the first question to the last answer's end, ``tokens`` of all
    answers, and the median of the seconds until ``first`` text came, over the requests, or all turns but the first."""

    system: str
    seconds: tuple[float, ...]
    tokens: tuple[int, ...]
    first: tuple[float, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens per second of each sample."""
        return tuple(n / s for n, s in zip(self.tokens, self.seconds, strict=True))


@dataclass(frozen=True)
class Load:
    """``clients`` that ask one question after the other, of all servers in turns; or hold conversations of so many
    ``turns``, of which the first has a long text."""

    precision: str
    clients: int
    servers: tuple[Served, ...]
    turns: int = 1

    def of(self, system: str) -> Served | None:
        """The samples of a server, if it was measured."""
        return next((s for s in self.servers if s.system == system), None)

    @property
    def what(self) -> str:
        """``4 clients, bf16``, or ``4 clients, 3 turns each, bf16``."""
        turns = f", {self.turns} turns each" if self.turns > 1 else ""
        return f"{self.clients} {'client' if self.clients == 1 else 'clients'}{turns}, {self.precision}"


@dataclass(frozen=True)
class ServingResults:
    """One run."""

    KIND: ClassVar[str] = "serving"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "python -m benchmarks.serving"

    date: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    loads: tuple[Load, ...]

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> ServingResults:
        """The run that plain data describes. Raises KeyError or TypeError where something is missing."""
        loads = [
            row
            | {
                "servers": tuple(
                    Served(**{k: v if k == "system" else tuple(v) for k, v in server.items()})
                    for server in row["servers"]
                )
            }
            for row in data["loads"]
        ]
        return cls(**data | {"loads": records(Load, loads)})


def table(found: ServingResults) -> Rows:
    """All servers, per number of clients; each of the others with how many times as fast ours is."""
    columns = [name for name in SYSTEMS if any(load.of(name) for load in found.loads)]
    rows = tuple((load.what, *(_cell(load, name) for name in columns)) for load in found.loads)
    title = (
        "Tokens per second of all answers together, medians with quartiles in parentheses, and until the first text of "
        "an answer, of conversations from the second turn on; with those of the other servers, how many times "
        "as fast, or as soon, tilewright is"
    )
    return Rows(title, ("", *columns), rows)


def _cell(load: Load, system: str) -> str:
    served, ours = load.of(system), load.of(OURS)
    if served is None:
        return NOTHING
    rate, first = quartiles(Spread.of(served.rates)), f"first {Spread.of(served.first).median * 1e3:.0f} ms"
    if ours is None or system == OURS:
        return f"{rate}\n{first}"
    faster, sooner = pair_ratios(ours.rates, served.rates), pair_ratios(served.first, ours.first)
    return f"{rate}\n{times(Spread.of(faster))}\n{first}: {Spread.of(sooner).median:.1f}×"


def latest(folder: Path = stored.FOLDER) -> list[ServingResults]:
    """The latest stored run on each device, the newest first."""
    return [run for _, run in stored.newest_of_each(ServingResults, "device", folder)]
