"""What the project wants to reach on an H100, and what a result file says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.chart_results import Chart, Point, ratio
from benchmarks.chart_scales import SCALES
from benchmarks.results import OURS, TORCH_COMPILE
from benchmarks.rows import NOTHING, Rows, figure
from benchmarks.samples import Spread

if TYPE_CHECKING:
    from benchmarks.gpu_results import GpuCheck

BF16, INT8, INT4 = (f"{OURS} {form}" for form in ("bf16", "int8", "int4"))
MODEL, CONTEXT, PROMPT = "llama2-7b", 1024, 4096
PAPER = (1.5, 3.5)
"""The lowest and the highest speedup over Hugging Face that FlashDecoding++'s chart (arXiv 2311.01282) shows. Its bars
have no figures, so a point is certainly ahead of its bar only above the highest of all."""


@dataclass(frozen=True)
class Target:
    """measured: the figure to hold against ``wanted``, None where the file does not have it. at_most: whether less is
    better. unit: behind figures; "%" for shares. note: what the figure is of. whole: whether it is of all that the
    target asks for; without that it may be missed, but is not met yet."""

    what: str
    wanted: float
    measured: float | None
    unit: str = "×"
    at_most: bool = False
    note: str = ""
    whole: bool = True

    @property
    def met(self) -> bool | None:
        """None where the file cannot tell."""
        if self.measured is None:
            return None
        reached = self.measured <= self.wanted if self.at_most else self.measured >= self.wanted
        return None if reached and not self.whole else reached

    def text(self, value: float) -> str:
        """A figure with its unit."""
        return f"{100 * value:.1f}%" if self.unit == "%" else f"{figure(value)}{self.unit}"


def of_chart(chart: Chart | None) -> list[Target]:
    """What a chart says; a chart that is None, or not of the paper's scale, says nothing of any."""
    known = chart if chart is not None and chart.scale == "paper" else None
    point = known.point(MODEL, 1, CONTEXT) if known else None
    prompt = known.prompt(MODEL, PROMPT) if known else None
    gap = next((g.gap for g in known.gaps if (g.model, g.system) == (MODEL, BF16)), None) if known else None

    def of_point(find: Callable[[Point], Spread | None]) -> float | None:
        return _median(find(point)) if point else None

    here = f"{MODEL}, batch 1, context {CONTEXT}"
    return [
        Target(f"{here}: bf16's share of the floor", 0.85, of_point(lambda p: p.share_of_floor(BF16)), "%"),
        Target(
            f"{here}: bf16 over torch.compile", 1.1, of_point(lambda p: ratio(p.decode, BF16, TORCH_COMPILE))
        ),
        Target(f"{here}: bf16 over Hugging Face eager", 5.0, of_point(lambda p: p.speedup(BF16))),
        *_every_point(known),
        Target(f"{here}: int8 over bf16", 1.7, of_point(lambda p: ratio(p.decode, INT8, BF16))),
        Target(f"{here}: int4 over bf16", 2.6, of_point(lambda p: ratio(p.decode, INT4, BF16))),
        Target(
            f"{MODEL}, prefill of {PROMPT}: bf16 over torch.compile",
            1.0,
            _median(ratio(prompt.prefill, BF16, TORCH_COMPILE)) if prompt and prompt.prefill else None,
        ),
        Target(
            f"{MODEL}, batch 1: part of a decode step in which the model does not run",
            0.02,
            gap.share if gap and gap.known else None,
            "%",
            at_most=True,
        ),
    ]


def of_check(check: GpuCheck) -> list[Target]:
    """What a check of a GPU says: of its chart's points, and of compiling."""
    times = check.found.compile_times if check.scale == "paper" else None
    cold, cached = (min(times.cold, default=None), min(times.cached, default=None)) if times else (None, None)
    return [
        *of_chart(check.found.chart),
        Target(f"{MODEL}: compiling, untuned", 30.0, cold, " s", at_most=True),
        Target(f"{MODEL}: compiling from the cache", 3.0, cached, " s", at_most=True),
    ]


def tables(targets: Sequence[Target], scale: str) -> list[Rows]:
    """One table, or none at another scale than the paper's."""
    if scale != "paper":
        return []
    rows = tuple(
        (
            t.what + (f" ({t.note})" if t.note else ""),
            f"{'≤' if t.at_most else '≥'} {t.text(t.wanted)}",
            NOTHING if t.measured is None else t.text(t.measured),
            {True: "yes", False: "no", None: "not known"}[t.met],
        )
        for t in targets
    )
    return [Rows("Targets, which are for an H100", ("", "target", "measured", "met"), rows)]


def _every_point(chart: Chart | None) -> list[Target]:
    """The slowest of all points against eager, which also says whether all are ahead of the paper's bars."""
    found = [s.median for p in (chart.points if chart else ()) if (s := p.speedup(BF16))]
    planned = SCALES["paper"].points
    note, least, whole = (
        f"{len(found)} of {planned} measured",
        min(found, default=None),
        len(found) == planned,
    )
    return [
        Target("every point: bf16 over Hugging Face eager", 2.5, least, note=note, whole=whole),
        Target(
            "every point: ahead of the highest bar of FlashDecoding++",
            PAPER[1],
            least,
            note=note,
            whole=whole,
        ),
    ]


def _median(spread: Spread | None) -> float | None:
    return spread.median if spread else None
