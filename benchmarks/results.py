"""What one run of the speed benchmark measured: raw samples, where and how; stored as JSON (``stored.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import stored
from benchmarks.samples import Spread, pair_ratios
from benchmarks.stored import records

OURS = "tilewright"
EAGER = "Hugging Face eager"
TORCH_COMPILE = "torch.compile"
LLAMA_CPP = "llama.cpp"
SYSTEMS = (OURS, EAGER, TORCH_COMPILE, LLAMA_CPP)
"""Names of everything that can be measured, in the order of tables."""

DECODE, PREFILL, FIRST_TOKEN, BATCHED = "decode", "prefill", "first token", "batched decode"
TASKS = (DECODE, PREFILL, FIRST_TOKEN, BATCHED)


@dataclass(frozen=True)
class Series:
    """One system's samples of a task.

    seconds: of each sample. batch: sequences side by side. bytes_per_step: weights and KV state that the system has
    to read for one decode step of the whole batch; 0 for other tasks.
    """

    system: str
    seconds: tuple[float, ...]
    batch: int = 1
    bytes_per_step: int = 0


@dataclass(frozen=True)
class Measure:
    """Samples of one task at one precision, those of all systems taken in turns.

    task: one of TASKS. size: the context of decoding, otherwise the length of the prompt. steps: tokens per sample and
    sequence. probe: read bandwidth of the machine beside each round of samples, in bytes per second. series: systems
    in the order of tables, each with a sample per round.
    """

    task: str
    precision: str
    size: int
    steps: int
    probe: tuple[float, ...]
    series: tuple[Series, ...]

    def of(self, system: str) -> Series | None:
        """The samples of a system, if it was measured."""
        return next((s for s in self.series if s.system == system), None)

    def rates(self, series: Series) -> tuple[float, ...]:
        """Tokens per second of each sample, all sequences of the batch together."""
        return tuple(self.steps * series.batch / s for s in series.seconds)

    def bandwidths(self, series: Series) -> tuple[float, ...]:
        """Bytes per second that decoding read in each sample."""
        return tuple(series.bytes_per_step * self.steps / s for s in series.seconds)

    def ratio(self, ours: Series, other: Series) -> Spread:
        """How many times as many tokens per second ``ours`` gives, round by round."""
        return Spread.of(pair_ratios(self.rates(ours), self.rates(other)))

    def share_of_probe(self, series: Series) -> Spread:
        """Bandwidth that decoding reached over the probe's beside it."""
        return Spread.of(pair_ratios(self.bandwidths(series), self.probe))

    def limits(self, series: Series) -> tuple[float, ...]:
        """Tokens per second that reading the bytes of a step at the probe's bandwidth would leave room for."""
        return tuple(series.batch * rate / series.bytes_per_step for rate in self.probe)


@dataclass(frozen=True)
class CompileTimes:
    """Seconds of ``tilewright.compile`` in fresh processes: with an empty cache folder, and with that folder again."""

    precision: str
    cold: tuple[float, ...]
    cached: tuple[float, ...]


@dataclass(frozen=True)
class MemoryUse:
    """Activations while a prompt of ``prompt`` tokens runs, and tensors allocated by one of our decode steps.

    arena_bytes: ours, planned. our_peak_bytes and eager_peak_bytes: what was live at most, measured alike; ours has the
    arena in it, scratch memory of kernels and copies of inputs. Weights and KV state are in none of these.
    """

    precision: str
    prompt: int
    arena_bytes: int
    our_peak_bytes: int
    eager_peak_bytes: int
    allocations_per_step: int


@dataclass(frozen=True)
class Results:
    """One run. ``machine``, ``versions`` and ``settings`` are plain facts by name, for whoever reads the file.

    left_out: what was asked for and could not be measured, with the reason.
    """

    KIND: ClassVar[str] = "speed"
    SCHEMA: ClassVar[int] = 2
    COMMAND: ClassVar[str] = "python -m benchmarks.cpu"

    date: str
    command: str
    model: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    measures: tuple[Measure, ...]
    compile_times: tuple[CompileTimes, ...]
    memory: tuple[MemoryUse, ...]
    left_out: tuple[str, ...] = ()

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Results:
        """The run that plain data describes. Raises KeyError or TypeError where something is missing."""
        measures = [row | {"series": records(Series, row["series"])} for row in data["measures"]]
        return cls(
            **data
            | {
                "measures": records(Measure, measures),
                "compile_times": records(CompileTimes, data["compile_times"]),
                "memory": records(MemoryUse, data["memory"]),
                "left_out": tuple(data["left_out"]),
            }
        )


def latest(folder: Path = stored.FOLDER) -> list[tuple[Path, Results]]:
    """The latest stored run of each processor and its file, the newest first."""
    return stored.newest_of_each(Results, "cpu", folder)
