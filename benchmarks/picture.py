"""A picture of the speed results: tokens per second by precision and system, below what the memory would allow."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.results import (
    DECODE,
    EAGER,
    LLAMA_CPP,
    OURS,
    SYSTEMS,
    TORCH_COMPILE,
    Measure,
    Results,
    Series,
)
from benchmarks.rows import figure
from benchmarks.samples import Spread
from benchmarks.system import LeftOut

COLOURS = {OURS: "#c8553d", EAGER: "#9aa5b1", TORCH_COMPILE: "#5b7c99", LLAMA_CPP: "#2f4858"}
TEXT, GRID = "#22272e", "#e3e7eb"
LIMIT = "limit set by the read bandwidth"
LOW = 0.1
"""Part of the axis below which a bar is too low to hold its figure."""
BAR = 0.86
"""Width of a bar; the bars of one precision are 1 apart, groups 2."""
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "svg.hashsalt": "tilewright",  # the same results give the same file
}


def draw(results: Results, file: Path) -> Path:
    """Draw every decode context side by side into ``file``, whose ending says the format. Raises LeftOut without
    matplotlib or anything to draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LeftOut("matplotlib is not installed; run: pip install matplotlib")
    measures = [m for m in results.measures if m.task == DECODE]
    if not measures:
        raise LeftOut("there is no decoding to draw")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    contexts = sorted({m.size for m in measures})
    top = 1.06 * max(max(_spread(m, s).high, _limit(m, s)) for m in measures for s in m.series)
    with mpl.rc_context(STYLE):
        canvas = Figure(figsize=(1.6 + 4.9 * len(contexts), 4.1), layout="constrained", facecolor="white")
        panels = canvas.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
        for panel, context in zip(panels, contexts, strict=True):
            _panel(panel, [m for m in measures if m.size == context], top)
        panels[0].set_ylabel("tokens per second")
        shown: dict[str, Any] = {}
        for panel in panels:
            handles, labels = panel.get_legend_handles_labels()
            shown |= dict(zip(labels, handles, strict=True))
        order = [name for name in (*SYSTEMS, LIMIT) if name in shown]
        columns = 3 if len(contexts) == 1 else len(order)
        handles = [shown[name] for name in order]
        canvas.legend(handles, order, loc="outside upper center", ncols=columns, frameon=False)
        machine = results.machine
        canvas.supxlabel(
            f"{results.model}, batch 1, {results.settings['threads']} threads of {machine['cpu']}; "
            "medians, whiskers are quartiles",
            fontsize=8,
        )
        return save(canvas, file)


def save(canvas: Any, file: Path) -> Path:
    """Write a figure so that the same results give the same file."""
    options: dict[str, Any] = {"metadata": {"Date": None}} if file.suffix == ".svg" else {"dpi": 200}
    canvas.savefig(file, **options)
    return file


def _panel(panel: Any, measures: Sequence[Measure], top: float) -> None:
    """The bars of one context: a group per precision, a bar per system, and above each what bandwidth allows."""
    left, ticks, names = 0.0, [], []
    for m in measures:
        series = [s for name in SYSTEMS if (s := m.of(name)) is not None]
        for n, s in enumerate(series):
            _bar(panel, left + n, s.system, _spread(m, s), _limit(m, s), top)
        ticks.append(left + (len(series) - 1) / 2)
        names.append(m.precision)
        left += len(series) + 1
    panel.set_title(f"Decoding at context {measures[0].size}", fontsize=10.5, loc="left")
    panel.set_xticks(ticks, names)
    panel.tick_params(length=0)
    panel.set_ylim(0, top)
    panel.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _bar(panel: Any, x: float, system: str, rate: Spread, limit: float, top: float) -> None:
    panel.bar(x, rate.median, BAR, color=COLOURS[system], label=system, zorder=2)
    whisker = [[rate.median - rate.low], [rate.high - rate.median]]
    panel.errorbar(x, rate.median, whisker, color=TEXT, linewidth=0.8, zorder=3)
    if limit:
        panel.hlines(limit, x - BAR / 2, x + BAR / 2, color=TEXT, linewidth=1.6, label=LIMIT, zorder=3)
    # At the foot of the bar, where neither whisker nor limit can cross it; a low bar has its figure above both.
    low = rate.high < LOW * top
    above = limit if rate.high <= limit < rate.high + LOW * top else rate.high
    panel.annotate(
        figure(rate.median),
        (x, above if low else 0),
        (0, 2 if low else 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7.5,
        color=TEXT if low else "white",
        zorder=4,
    )


def _spread(m: Measure, series: Series) -> Spread:
    return Spread.of(m.rates(series))


def _limit(m: Measure, series: Series) -> float:
    """Tokens per second that the probe's bandwidth would allow; 0 where the bytes of a step are not known."""
    return median(m.limits(series)) if series.bytes_per_step else 0.0
