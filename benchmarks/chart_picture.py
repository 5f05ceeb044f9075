"""The chart as a picture, laid out like the paper's: a panel per model, bars of speedup over Hugging Face eager,
diamonds of tokens per second, and above our bars their share of the floor."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.chart_results import FORMS, SYSTEMS, Chart, Point
from benchmarks.picture import GRID, STYLE, TEXT, save
from benchmarks.results import EAGER, TORCH_COMPILE
from benchmarks.rows import figure
from benchmarks.system import LeftOut

COLOURS = dict(zip(FORMS, ("#c8553d", "#e09f5a", "#f2cf7e"), strict=True)) | {
    EAGER: "#9aa5b1",
    TORCH_COMPILE: "#5b7c99",
}
RATE = "tokens per second"


def draw(chart: Chart, file: Path) -> Path:
    """Draw into ``file``, whose ending says the format. Raises LeftOut without matplotlib or anything to draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LeftOut("matplotlib is not installed; run: pip install matplotlib")
    if not chart.points:
        raise LeftOut("there is no point to draw")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(p.model for p in chart.points))
    with mpl.rc_context(STYLE):
        canvas = Figure(figsize=(12.5, 0.6 + 3.0 * len(names)), layout="constrained", facecolor="white")
        panels = canvas.subplots(len(names), 1, squeeze=False)[:, 0]
        shown: dict[str, Any] = {}
        for panel, name in zip(panels, names, strict=True):
            points = sorted((p for p in chart.points if p.model == name), key=lambda p: (p.batch, p.context))
            shown |= _panel(panel, name, points)
        order = [name for name in (*SYSTEMS, RATE) if name in shown]
        canvas.legend(
            [shown[n] for n in order], order, loc="outside upper center", ncols=len(order), frameon=False
        )
        canvas.supxlabel(
            f"{chart.machine['device']}, {chart.date[:10]}; bars: speedup over Hugging Face eager; percentages: the "
            "time that reading weights and KV state at the measured bandwidth would take, over that of a step",
            fontsize=8,
        )
        return save(canvas, file)


def _panel(panel: Any, name: str, points: Sequence[Point]) -> dict[str, Any]:
    """Draw one model; gives what the legend shows."""
    shown: dict[str, Any] = {}
    rates = panel.twinx()
    left, ticks, labels = 0.0, [], []
    for point in points:
        systems = [s for s in SYSTEMS if point.decode.of(s) is not None]
        for n, system in enumerate(systems):
            _bar(panel, rates, left + n, system, point, shown)
        ticks.append(left + (len(systems) - 1) / 2)
        labels.append(f"{point.context}\nbatch {point.batch}")
        left += len(systems) + 1
    panel.set_title(name, fontsize=10.5, loc="left")
    panel.set_xticks(ticks, labels)
    panel.tick_params(length=0)
    panel.set_ylabel("speedup over eager")
    panel.set_ylim(bottom=0)
    panel.margins(y=0.15)
    panel.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    rates.set_ylabel(RATE)
    rates.set_ylim(bottom=0)
    rates.spines[["top", "left"]].set_visible(False)
    return shown


def _bar(panel: Any, rates: Any, x: float, system: str, point: Point, shown: dict[str, Any]) -> None:
    rate, speedup = point.rate(system), point.speedup(system)
    if speedup is not None:
        shown[system] = panel.bar(x, speedup.median, 0.86, color=COLOURS[system], zorder=2)
        share = point.share_of_floor(system)
        text = figure(speedup.median) + "×"
        if share is not None and system in FORMS:
            text += f"\n{share.median:.0%}"
        panel.annotate(
            text,
            (x, speedup.median),
            (0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6.5,
        )
    if rate is not None:
        (shown[RATE],) = rates.plot(
            x, rate.median, marker="D", color=TEXT, markersize=4, linestyle="none", zorder=5
        )
