"""The results as tables: for the terminal, and the same rows as Markdown for the README."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from benchmarks.results import CompileTimes, Measure, MemoryUse, Results
from benchmarks.samples import Spread
from tilewright.report import size_text


@dataclass(frozen=True)
class Rows:
    """A table as text: the first column is words, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for n, name in enumerate(self.columns):
            table.add_column(name, justify="right" if n else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def tables(results: Results) -> list[Table]:
    """Everything that was measured, with quartiles, for the terminal."""
    found = [speed(results), bandwidth(results), compile_times(results), memory(results)]
    return [rows.rich() for rows in found if rows.rows]


def speed(results: Results) -> Rows:
    """Ours beside Hugging Face eager, per task and dtype."""
    rows = tuple((_task(m), *_sides(m), _ratio(m.speedup)) for m in results.measures)
    return Rows("Speed: median (quartiles)", ("", "tilewright", "Hugging Face eager", "speedup"), rows)


def bandwidth(results: Results) -> Rows:
    """How close decoding comes to the memory bandwidth of the machine at that minute."""
    rows = tuple(
        (
            _task(m),
            f"{m.bytes_per_token / 1e6:.0f} MB",
            _quartiles(m.bandwidth, "GB/s", 1e-9),
            _quartiles(Spread.of(m.probe), "GB/s", 1e-9),
            f"{m.share_of_probe.median:.0%}",
        )
        for m in results.measures
        if m.bytes_per_token
    )
    columns = ("", "read per token", "achieved", "read probe", "share")
    return Rows("Memory bandwidth", columns, rows)


def compile_times(results: Results) -> Rows:
    rows = tuple(_compile_row(c) for c in results.compile_times)
    return Rows("Compile time, median of fresh processes", ("", "cold", "from the cache"), rows)


def memory(results: Results) -> Rows:
    rows = tuple(_memory_row(m) for m in results.memory)
    columns = ("", "our arena", "our peak", "eager's peak", "arena / eager", "allocations per decode step")
    return Rows("Activation memory, without weights and KV state", columns, rows)


def _task(m: Measure) -> str:
    where = {
        "decode": f"at context {m.size}",
        "prefill": f"of {m.size}",
        "first token": f"after a prompt of {m.size}",
    }
    return f"{m.task} {where[m.task]}, {m.dtype}"


def _sides(m: Measure) -> tuple[str, str]:
    if m.task == "first token":
        return _quartiles(Spread.of(m.ours), "ms", 1e3), _quartiles(Spread.of(m.theirs), "ms", 1e3)
    return _quartiles(m.rate(m.ours), "tokens/s"), _quartiles(m.rate(m.theirs), "tokens/s")


def _compile_row(c: CompileTimes) -> tuple[str, str, str]:
    return c.dtype, f"{Spread.of(c.cold).median:.1f} s", f"{Spread.of(c.cached).median:.1f} s"


def _memory_row(m: MemoryUse) -> tuple[str, ...]:
    share = m.arena_bytes / m.eager_peak_bytes
    sizes = map(size_text, (m.arena_bytes, m.our_peak_bytes, m.eager_peak_bytes))
    return f"prompt of {m.prompt}, {m.dtype}", *sizes, f"{share:.2f}", str(m.allocations_per_step)


def _quartiles(spread: Spread, unit: str, scale: float = 1.0) -> str:
    low, median, high = (_figure(v * scale) for v in (spread.low, spread.median, spread.high))
    return f"{median} {unit} ({low}–{high})"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f}× ({spread.low:.2f}–{spread.high:.2f})"


def _figure(value: float) -> str:
    """Three digits, which is more than such measurements hold."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
