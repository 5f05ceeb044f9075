"""The speed results as tables: for the terminal, and the same rows as Markdown for the README."""

from __future__ import annotations

from benchmarks.results import (
    BATCHED,
    DECODE,
    FIRST_TOKEN,
    OURS,
    PREFILL,
    SYSTEMS,
    TASKS,
    CompileTimes,
    Measure,
    MemoryUse,
    Results,
    Series,
)
from benchmarks.rows import NOTHING, Rows, figure, quartiles, times
from benchmarks.samples import Spread
from tilewright.report import size_text


def tables(results: Results) -> list[Rows]:
    """Everything that was measured."""
    found = [speed(results), bandwidth(results), batched(results), compile_times(results), memory(results)]
    return [rows for rows in found if rows.rows]


def speed(results: Results) -> Rows:
    """All systems, per task and precision; each of the others with what ours does beside it."""
    measures = [m for m in _ordered(results) if m.task != BATCHED]
    columns = [name for name in SYSTEMS if any(m.of(name) for m in measures)]
    rows = tuple((_task(m), *(_speed(m, name) for name in columns)) for m in measures)
    title = (
        "Tokens per second (first token: milliseconds), medians with quartiles in parentheses; below those of the "
        "other systems, how many times as fast tilewright is"
    )
    return Rows(title, ("", *columns), rows)


def bandwidth(results: Results) -> Rows:
    """How close decoding comes to the memory bandwidth of the machine at that minute."""
    measures = [m for m in _ordered(results) if m.task == DECODE and _reads(m.of(OURS))]
    others = [name for name in SYSTEMS if name != OURS and any(_reads(m.of(name)) for m in measures)]
    rows = tuple(_bandwidth(m, others) for m in measures)
    columns = (
        "",
        "read per token",
        "achieved",
        "read probe",
        "share",
        *(f"share, {name}" for name in others),
    )
    return Rows("Memory bandwidth of decoding; the shares are those of the read probe", columns, rows)


def batched(results: Results) -> Rows:
    """Several sequences side by side, beside one: all of their tokens count."""
    rows = tuple(_batched(m) for m in results.measures if m.task == BATCHED)
    columns = ("", "batch 1", "batched", "batched / batch 1", "tokens/s of each sequence")
    return Rows("Batched decoding", columns, rows)


def compile_times(results: Results) -> Rows:
    rows = tuple(_compile_row(c) for c in results.compile_times)
    return Rows("Compile time, median of fresh processes", ("", "cold", "from the cache"), rows)


def memory(results: Results) -> Rows:
    rows = tuple(_memory_row(m) for m in results.memory)
    columns = ("", "our arena", "our peak", "eager's peak", "arena / eager", "allocations per decode step")
    return Rows("Activation memory, without weights and KV state", columns, rows)


def _ordered(results: Results) -> list[Measure]:
    """By task first, so that precisions of one task stand together."""
    return sorted(results.measures, key=lambda m: (TASKS.index(m.task), m.size))


def _task(m: Measure) -> str:
    where = {
        DECODE: f"at context {m.size}",
        BATCHED: f"at context {m.size}",
        PREFILL: f"of {m.size}",
        FIRST_TOKEN: f"after a prompt of {m.size}",
    }
    return f"{m.task} {where[m.task]}, {m.precision}"


def _speed(m: Measure, system: str) -> str:
    """``47.9 (46.8–47.9)``, and for another system than ours, on a second line, how many times as fast ours is."""
    series, ours = m.of(system), m.of(OURS)
    if series is None:
        return NOTHING
    if m.task == FIRST_TOKEN:
        text = quartiles(Spread.of(series.seconds), "ms", 1e3)
    else:
        text = quartiles(Spread.of(m.rates(series)))
    if ours is None or system == OURS:
        return text
    return f"{text}\n{times(m.ratio(ours, series))}"


def _reads(series: Series | None) -> bool:
    return series is not None and series.bytes_per_step > 0


def _bandwidth(m: Measure, others: list[str]) -> tuple[str, ...]:
    ours = m.of(OURS)
    assert ours is not None
    shares = [m.of(name) for name in others]
    return (
        _task(m),
        f"{ours.bytes_per_step / 1e6:.0f} MB",
        quartiles(Spread.of(m.bandwidths(ours)), "GB/s", 1e-9),
        quartiles(Spread.of(m.probe), "GB/s", 1e-9),
        f"{m.share_of_probe(ours).median:.0%}",
        *(NOTHING if s is None else f"{m.share_of_probe(s).median:.0%}" for s in shares),
    )


def _batched(m: Measure) -> tuple[str, ...]:
    one, several = m.series
    rates = Spread.of(m.rates(several))
    return (
        f"{m.task} at context {m.size}, {m.precision}, batch {several.batch}",
        quartiles(Spread.of(m.rates(one)), "tokens/s"),
        quartiles(rates, "tokens/s"),
        times(m.ratio(several, one)),
        figure(rates.median / several.batch),
    )


def _compile_row(c: CompileTimes) -> tuple[str, str, str]:
    return c.precision, f"{Spread.of(c.cold).median:.1f} s", f"{Spread.of(c.cached).median:.1f} s"


def _memory_row(m: MemoryUse) -> tuple[str, ...]:
    share = m.arena_bytes / m.eager_peak_bytes
    sizes = map(size_text, (m.arena_bytes, m.our_peak_bytes, m.eager_peak_bytes))
    return f"prompt of {m.prompt}, {m.precision}", *sizes, f"{share:.2f}", str(m.allocations_per_step)
