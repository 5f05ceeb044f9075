"""The chart as a picture, laid out like the paper's: a panel per model, bars of speedup over Hugging Face eager,
diamonds of tokens per second, and above the bars their speedup and our share of the floor."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.chart_results import FORMS, SYSTEMS, Chart, Point
from benchmarks.picture import GRID, STYLE, TEXT, save
from benchmarks.results import EAGER, TORCH_COMPILE
from benchmarks.rows import figure
from benchmarks.system import LeftOut
from benchmarks.targets import PAPER

COLOURS = dict(zip(FORMS, ("#c8553d", "#e09f5a", "#f2cf7e"), strict=True)) | {
    EAGER: "#9aa5b1",
    TORCH_COMPILE: "#5b7c99",
}
RATE = "tokens per second (right axis)"
PUBLISHED = f"FlashDecoding++ as published: {PAPER[0]}–{PAPER[1]}×"
NAMES = {"llama2-7b": "Llama2-7B", "llama2-13b": "Llama2-13B", "opt-6.7b": "OPT-6.7B"}
GAP, BATCH_GAP = 1.0, 1.2
"""Widths of bars between points, and between batches beyond that."""


def draw(chart: Chart, file: Path) -> Path:
    """Draw into ``file``, whose ending says the format. Raises LeftOut without matplotlib or anything to draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LeftOut(
            "matplotlib is not installed; run: pip install matplotlib, "
            "and then, here or elsewhere: python -m benchmarks.chart --show FILE"
        )
    if not chart.points:
        raise LeftOut("there is no point to draw")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(p.model for p in chart.points))
    with mpl.rc_context(STYLE):
        canvas = Figure(figsize=(12.5, 0.8 + 3.4 * len(names)), layout="constrained", facecolor="white")
        panels = canvas.subplots(len(names), 1, squeeze=False)[:, 0]
        shown: dict[str, Any] = {}
        for panel, name in zip(panels, names, strict=True):
            points = sorted((p for p in chart.points if p.model == name), key=lambda p: (p.batch, p.context))
            shown |= _panel(panel, name, points)
            if chart.scale == "paper":
                shown[PUBLISHED] = panel.axhspan(*PAPER, color="#6a9a5b", alpha=0.25, linewidth=0, zorder=1)
        order = [name for name in (*SYSTEMS, RATE, PUBLISHED) if name in shown]
        canvas.legend(
            [shown[n] for n in order], order, loc="outside upper center", ncols=len(order), frameon=False,
            fontsize=8, columnspacing=1.4, handlelength=1.4,
        )  # fmt: skip
        canvas.supxlabel(
            f"{chart.machine['device']}, {chart.days}. Bars: speedup over Hugging Face eager. Above them: the "
            "speedup and, of ours, the share of the floor,\nwhich is the time that reading weights and KV state at the "
            "measured bandwidth would take, over that of a step.",
            fontsize=8,
        )
        return save(canvas, file)


def _panel(panel: Any, name: str, points: Sequence[Point]) -> dict[str, Any]:
    """Draw one model; gives what the legend shows."""
    shown: dict[str, Any] = {}
    rates = panel.twinx()
    left, ticks, labels = 0.0, [], []
    for batch, group in groupby(points, key=lambda p: p.batch):
        begin = left
        for point in group:
            systems = [s for s in SYSTEMS if point.decode.of(s) is not None]
            for n, system in enumerate(systems):
                _bar(panel, rates, left + n, system, point, shown)
            ticks.append(left + (len(systems) - 1) / 2)
            labels.append(_short(point.context))
            left += len(systems) + GAP
        middle = (begin + left - GAP - 1) / 2
        panel.annotate(
            f"batch {batch}", (middle, 0), (0, -18), xycoords=panel.get_xaxis_transform(),
            textcoords="offset points", ha="center", va="top",
        )  # fmt: skip
        left += BATCH_GAP
    panel.set_title(f"{NAMES.get(name, name)}, by context and batch", fontsize=10.5, loc="left", pad=54)
    panel.set_xticks(ticks, labels)
    panel.set_xlim(-1, left - GAP - BATCH_GAP)
    panel.tick_params(length=0)
    panel.set_ylabel("speedup over eager (×)")
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    rates.set_ylabel("tokens per second")
    rates.set_ylim(bottom=0)
    rates.spines[["top", "left"]].set_visible(False)
    rates.tick_params(length=0)
    return shown


def _short(context: int) -> str:
    """1024 is 1k, as the paper writes it."""
    return f"{context // 1024}k" if context >= 1024 and context % 1024 == 0 else str(context)


def _bar(panel: Any, rates: Any, x: float, system: str, point: Point, shown: dict[str, Any]) -> None:
    rate, speedup = point.rate(system), point.speedup(system)
    if speedup is not None:
        shown[system] = panel.bar(x, speedup.median, 0.86, color=COLOURS[system], zorder=2)
    if rate is not None:
        (shown[RATE],) = rates.plot(
            x, rate.median, marker="D", color=TEXT, markersize=4, linestyle="none", zorder=5,
            markeredgecolor="white", markeredgewidth=0.6, clip_on=False,
        )  # fmt: skip
    share = point.share_of_floor(system) if system in FORMS else None
    said = [f"{figure(speedup.median)}×"] if speedup is not None and system != EAGER else []
    said += [f"{share.median:.0%}"] if share is not None else []
    # In a strip of their own above the panel, where neither bars nor diamonds can cross them.
    panel.annotate(
        "  ".join(said), (x, 1), (0, 3), xycoords=panel.get_xaxis_transform(), textcoords="offset points",
        rotation=90, ha="center", va="bottom", fontsize=6.5,
    )  # fmt: skip
