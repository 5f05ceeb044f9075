"""The chart as tables: for the terminal, and the same rows as Markdown for the README."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.chart_results import FORMS, SYSTEMS, Chart, Point, Prompt
from benchmarks.results import EAGER, Measure
from benchmarks.rows import NOTHING, Rows, figure
from benchmarks.samples import Spread
from tilewright.report import size_text


def tables(chart: Chart) -> list[Rows]:
    """Everything that was measured."""
    models = list(dict.fromkeys(e.model for e in (*chart.points, *chart.prompts, *chart.gaps)))
    points = sorted(chart.points, key=lambda p: (models.index(p.model), p.batch, p.context))
    prompts = sorted(chart.prompts, key=lambda p: (models.index(p.model), p.size))
    forward = [(p, p.prefill) for p in prompts if p.prefill is not None]
    found = (
        _decode(points),
        _prompts("from a prompt to its first token, by generate()", [(p, p.first_token) for p in prompts]),
        _prompts("that a prompt's forward takes (prefill)", forward),
        _gaps(chart),
        _memory(points),
        Rows("Left out", ("model, point, system", "reason"), _left_out(chart)),
    )
    return [rows for rows in found if rows.rows]


def _label(point: Point) -> str:
    return f"{point.model}, batch {point.batch}, context {point.context}"


def _systems(measures: Sequence[Measure]) -> list[str]:
    return [name for name in SYSTEMS if any(m.of(name) for m in measures)]


def _decode(points: Sequence[Point]) -> Rows:
    columns = _systems([p.decode for p in points])
    rows = tuple((_label(p), *(_rate(p, name) for name in columns)) for p in points)
    title = (
        "Tokens per second of all sequences together (medians); below them how many times as fast as Hugging Face "
        "eager, and of ours the share of the floor: the time that reading weights and KV state at the measured "
        "bandwidth takes"
    )
    return Rows(title, ("", *columns), rows)


def _rate(point: Point, system: str) -> str:
    rate, speedup, share = point.rate(system), point.speedup(system), point.share_of_floor(system)
    if rate is None:
        return NOTHING
    lines = [figure(rate.median)]
    if system != EAGER and speedup is not None:
        lines.append(f"{figure(speedup.median)}×")
    if system in FORMS and share is not None:
        lines.append(f"{share.median:.0%}")
    return "\n".join(lines)


def _prompts(what: str, measured: Sequence[tuple[Prompt, Measure]]) -> Rows:
    columns = _systems([m for _, m in measured])
    rows = tuple(
        (f"{p.model}, batch 1, {p.size} tokens", *(_milliseconds(m, name) for name in columns))
        for p, m in measured
    )
    return Rows(f"Milliseconds {what}", ("", *columns), rows)


def _milliseconds(measure: Measure, system: str) -> str:
    series = measure.of(system)
    return figure(1e3 * Spread.of(series.seconds).median) if series else NOTHING


def _gaps(chart: Chart) -> Rows:
    rows = tuple(
        (
            f"{g.model}, {g.system}, batch {g.gap.batch}",
            f"{figure(1e3 * g.gap.token)} ms",
            f"{figure(1e3 * g.gap.model)} ms",
            f"{g.gap.share:.1%}" if g.gap.known else NOTHING,
        )
        for g in chart.gaps
    )
    return Rows("Between decode steps", ("", "token to token", "the model's part", "without the model"), rows)


def _memory(points: Sequence[Point]) -> Rows:
    columns = [name for name in SYSTEMS if any(p.peak_bytes.get(name) for p in points)]
    rows = tuple(
        (
            _label(point),
            *(size_text(n) if (n := point.peak_bytes.get(name)) else NOTHING for name in columns),
            size_text(max(point.arena_bytes.values(), default=0)),
            size_text(point.graph_bytes),
        )
        for point in points
        if point.peak_bytes
    )
    return Rows(
        "Most memory allocated above the weights while the context is run and decoded from: KV state (ours has room "
        "for the longest context of its batch) and activations (ours: the arena)",
        ("", *columns, "our arena", "our CUDA graphs"),
        rows,
    )


def _left_out(chart: Chart) -> tuple[tuple[str, str], ...]:
    return tuple((f"{m.model}, {m.where}, {m.system}", m.reason) for m in chart.left_out)
