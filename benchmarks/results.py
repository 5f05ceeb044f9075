"""What one run of the benchmark measured: raw samples, where and how; stored as JSON, read back to the same object."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.samples import Spread, pair_ratios

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measure:
    """Samples of one task, ours and Hugging Face's taken in turns.

    task: "decode" (``size`` is the context length), "prefill" or "first token" (``size`` is the prompt length).
    tokens: tokens per sample. ours, theirs: seconds per sample. probe: read bandwidth of the machine beside each
    pair, in bytes per second. bytes_per_token: weights and KV state that a decode step has to read; 0 for other tasks.
    """

    task: str
    dtype: str
    size: int
    tokens: int
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    probe: tuple[float, ...]
    bytes_per_token: int = 0

    def rate(self, seconds: tuple[float, ...]) -> Spread:
        """Tokens per second."""
        return Spread.of([self.tokens / s for s in seconds])

    @property
    def speedup(self) -> Spread:
        """Hugging Face's time over ours, pair by pair."""
        return Spread.of(pair_ratios(self.theirs, self.ours))

    @property
    def bandwidth(self) -> Spread:
        """Bytes per second that our decoding read."""
        return Spread.of([self.bytes_per_token * self.tokens / s for s in self.ours])

    @property
    def share_of_probe(self) -> Spread:
        """Our bandwidth over the probe's beside it."""
        achieved = [self.bytes_per_token * self.tokens / s for s in self.ours]
        return Spread.of(pair_ratios(achieved, self.probe))


@dataclass(frozen=True)
class CompileTimes:
    """Seconds of ``tilewright.compile`` in fresh processes: with an empty cache folder, and with that folder again."""

    dtype: str
    cold: tuple[float, ...]
    cached: tuple[float, ...]


@dataclass(frozen=True)
class MemoryUse:
    """Activations while a prompt of ``prompt`` tokens runs, and tensors allocated by one of our decode steps.

    arena_bytes: ours, planned. our_peak_bytes and eager_peak_bytes: what was live at most, measured alike; ours has the
    arena in it, scratch memory of kernels and copies of inputs. Weights and KV state are in none of these.
    """

    dtype: str
    prompt: int
    arena_bytes: int
    our_peak_bytes: int
    eager_peak_bytes: int
    allocations_per_step: int


@dataclass(frozen=True)
class Results:
    """One run. ``machine``, ``versions`` and ``settings`` are plain facts by name, for whoever reads the file."""

    date: str
    command: str
    model: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    measures: tuple[Measure, ...]
    compile_times: tuple[CompileTimes, ...]
    memory: tuple[MemoryUse, ...]

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Results:
        """Raises ValueError for another schema or missing fields."""
        data = json.loads(text)
        schema = data.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"schema {schema}, but this version reads {SCHEMA}; run the benchmark again")
        try:
            return Results(
                **data
                | {
                    "measures": _records(Measure, data["measures"]),
                    "compile_times": _records(CompileTimes, data["compile_times"]),
                    "memory": _records(MemoryUse, data["memory"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a result of this benchmark: {error}") from error

    def save(self, file: Path | None = None) -> Path:
        """Write to ``file``, by default ``results/<cpu>/<date>.json``; returns where."""
        if file is None:
            file = FOLDER / _slug(str(self.machine["cpu"])) / f"{self.date[:19].replace(':', '')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.to_json())
        return file


def newest(folder: Path = FOLDER) -> Results:
    """The latest stored run by its own date. Raises FileNotFoundError when there is none."""
    found = [Results.from_json(file.read_text()) for file in folder.rglob("*.json")]
    if not found:
        raise FileNotFoundError(f"no results below {folder}; run: python -m benchmarks.cpu")
    return max(found, key=lambda r: r.date)


def _records(cls: type[Any], rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    return tuple(
        cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}) for row in rows
    )


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
