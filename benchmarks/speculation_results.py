"""What one run of the benchmark of speculative decoding measured, and its table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import stored
from benchmarks.results import EAGER, OURS
from benchmarks.rows import NOTHING, Rows, quartiles, times
from benchmarks.samples import Spread, pair_ratios
from benchmarks.stored import records

OURS_GUESSING, EAGER_GUESSING = f"{OURS}, prompt lookup", f"{EAGER}, prompt lookup"
COLUMNS = (OURS_GUESSING, OURS, EAGER_GUESSING, EAGER)
"""Who answers, in the order of tables."""


@dataclass(frozen=True)
class Answered:
    """Samples of one system: of each, seconds of the answer. tokens: of the answer, the same in each."""

    system: str
    tokens: int
    seconds: tuple[float, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens per second of each sample, the prompt's time included."""
        return tuple(self.tokens / s for s in self.seconds)


@dataclass(frozen=True)
class Question:
    """A question that all answer in turns. task: what an answer has in common with it."""

    task: str
    precision: str
    answers: tuple[Answered, ...]

    def of(self, system: str) -> Answered | None:
        """The samples of a system, if it was measured."""
        return next((a for a in self.answers if a.system == system), None)

    @property
    def what(self) -> str:
        """``corrects the question's text, bf16``."""
        return f"{self.task}, {self.precision}"


@dataclass(frozen=True)
class SpeculationResults:
    """One run."""

    KIND: ClassVar[str] = "speculation"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "python -m benchmarks.speculation"

    date: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    questions: tuple[Question, ...]

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> SpeculationResults:
        """The run that plain data describes. Raises KeyError or TypeError where something is missing."""
        rows = [row | {"answers": records(Answered, row["answers"])} for row in data["questions"]]
        return cls(**data | {"questions": records(Question, rows)})


def table(found: SpeculationResults) -> Rows:
    """All systems, per question; each of the others with how many times as fast ours is that guesses."""
    columns = [name for name in COLUMNS if any(q.of(name) for q in found.questions)]
    rows = tuple((q.what, *(_cell(q, name) for name in columns)) for q in found.questions)
    title = (
        "Tokens per second of an answer, prompt included, medians with quartiles in parentheses; below the others, how "
        "many times as fast tilewright with prompt lookup is"
    )
    return Rows(title, ("an answer that", *columns), rows)


def _cell(question: Question, system: str) -> str:
    answered, ours = question.of(system), question.of(OURS_GUESSING)
    if answered is None:
        return NOTHING
    rate = quartiles(Spread.of(answered.rates))
    if ours is None or system == OURS_GUESSING:
        return rate
    return f"{rate}\n{times(Spread.of(pair_ratios(ours.rates, answered.rates)))}"


def latest(folder: Path = stored.FOLDER) -> list[SpeculationResults]:
    """The latest stored run on each device, the newest first."""
    return [run for _, run in stored.newest_of_each(SpeculationResults, "device", folder)]
