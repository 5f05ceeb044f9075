"""The chart as tables: for the terminal, and the same rows as Markdown for the README."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.chart_results import FORMS, SYSTEMS, Chart, Point
from benchmarks.results import EAGER, Measure
from benchmarks.rows import NOTHING, Rows, figure
from benchmarks.samples import Spread
from tilewright.report import size_text


def tables(chart: Chart) -> list[Rows]:
    """Everything that was measured."""
    models = list(dict.fromkeys(p.model for p in chart.points))
    points = sorted(chart.points, key=lambda p: (models.index(p.model), p.batch, p.context))
    return [rows for rows in (_decode(points), _first_token(points), _memory(points)) if rows.rows]


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


def _first_token(points: Sequence[Point]) -> Rows:
    measured = [(p, p.first_token) for p in points if p.first_token is not None]
    columns = _systems([m for _, m in measured])
    rows = tuple((_label(p), *(_milliseconds(m, name) for name in columns)) for p, m in measured)
    return Rows("Milliseconds from a prompt as long as the context to its first token", ("", *columns), rows)


def _milliseconds(measure: Measure, system: str) -> str:
    series = measure.of(system)
    return figure(1e3 * Spread.of(series.seconds).median) if series else NOTHING


def _memory(points: Sequence[Point]) -> Rows:
    """Of points on a GPU, where PyTorch counts what is allocated."""
    counted = [p for p in points if any(p.peak_bytes.values())]
    columns = [name for name in SYSTEMS if any(p.peak_bytes.get(name) for p in counted)]
    rows = []
    for point in counted:
        arena = max(point.arena_bytes.values(), default=0)
        peaks = (point.peak_bytes.get(name, 0) for name in columns)
        rows.append(
            (
                _label(point),
                *(size_text(n) if n else NOTHING for n in peaks),
                size_text(arena),
                size_text(point.graph_bytes),
            )
        )
    return Rows(
        "Most device memory allocated while decoding, weights included",
        ("", *columns, "our arena", "our CUDA graphs"),
        tuple(rows),
    )
