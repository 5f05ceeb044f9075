"""What a result file says of the targets, and nothing that it does not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import targets
from benchmarks.chart_results import Gap
from benchmarks.chart_scales import SCALES
from benchmarks.results import CompileTimes
from benchmarks.step_gaps import StepGap
from benchmarks.targets import BF16, Target

from .sample_results import made_up_chart, made_up_check, point, prompt

HERE = "llama2-7b, batch 1, context 1024: "


def by_name(found: list[Target]) -> dict[str, tuple[float | None, bool | None]]:
    return {t.what: (t.measured, t.met) for t in found}


def test_an_empty_or_tiny_chart_says_nothing() -> None:
    for chart in (None, made_up_chart(scale="paper"), made_up_chart(point("llama2-7b", context=1024))):
        assert {met for _, met in by_name(targets.of_chart(chart)).values()} == {None}
        assert all(measured is None for measured, _ in by_name(targets.of_chart(chart)).values())


def test_each_figure_is_held_against_its_target() -> None:
    """Eager takes 4 s and ours 0.5 s for ten steps of 100 MB; the floor at 4 GB/s is 0.25 s."""
    one = point("llama2-7b", context=1024, ours=0.5, torch_compile=0.525, int8=0.25, int4=0.25)
    chart = made_up_chart(one, scale="paper", prompts=(prompt("llama2-7b", 4096),))
    chart = chart.having(Gap("llama2-7b", BF16, StepGap(1, token=1e-3, model=0.985e-3)))
    found = by_name(targets.of_chart(chart))
    expected = {
        f"{HERE}bf16's share of the floor": (0.5, False),
        f"{HERE}bf16 over torch.compile": (1.05, False),
        f"{HERE}bf16 over Hugging Face eager": (8.0, True),
        f"{HERE}int8 over bf16": (2.0, True),
        f"{HERE}int4 over bf16": (2.0, False),
        "llama2-7b, prefill of 4096: bf16 over torch.compile": (1.5, True),
        "llama2-7b, batch 1: part of a decode step in which the model does not run": (0.015, True),
    }
    for what, (measured, met) in expected.items():
        assert found[what] == (pytest.approx(measured), met)


def test_every_point_means_all_of_them() -> None:
    """One slow point is enough to miss; fast ones are not enough to meet, unless none is missing."""
    paper = SCALES["paper"]
    keys = [(m, b, c) for m in paper.models for b, sizes in paper.contexts.items() for c in sizes]
    fast = [point(m, b, ours=1.25, context=c) for m, b, c in keys]
    what = "every point: bf16 over Hugging Face eager"
    paper_bar = "every point: ahead of the highest bar of FlashDecoding++"
    some = by_name(targets.of_chart(made_up_chart(*fast[:-1], scale="paper")))
    assert some[what] == (pytest.approx(3.2), None)
    assert some[paper_bar] == (pytest.approx(3.2), False)
    assert by_name(targets.of_chart(made_up_chart(*fast, scale="paper")))[what][1] is True
    slow = replace(fast[0], decode=point(ours=2.0).decode)
    assert by_name(targets.of_chart(made_up_chart(slow, scale="paper")))[what] == (2.0, False)


def test_a_share_that_drowned_in_noise_is_not_known() -> None:
    chart = made_up_chart(scale="paper").having(Gap("llama2-7b", BF16, StepGap(1, token=1.0, model=1.2)))
    assert targets.of_chart(chart)[-1].met is None


def test_a_check_adds_compile_times() -> None:
    found = by_name(targets.of_check(made_up_check()))
    assert found["llama2-7b: compiling, untuned"] == (25.0, True)
    assert found["llama2-7b: compiling from the cache"] == (4.0, False)
    assert found[f"{HERE}bf16 over Hugging Face eager"] == (4.0, False)
    cut = made_up_check()
    cut = replace(cut, found=replace(cut.found, compile_times=CompileTimes("bf16", (20.0,), ())))
    assert by_name(targets.of_check(cut))["llama2-7b: compiling from the cache"] == (None, None)


def test_the_table_is_of_the_papers_scale_only() -> None:
    found = targets.of_check(made_up_check())
    assert targets.tables(found, "tiny") == []
    (rows,) = targets.tables(found, "paper")
    assert ("llama2-7b: compiling, untuned", "≤ 30.0 s", "25.0 s", "yes") in rows.rows
    assert (f"{HERE}bf16's share of the floor", "≥ 85.0%", "25.0%", "no") in rows.rows
    assert (f"{HERE}int8 over bf16", "≥ 1.70×", "–", "not known") in rows.rows
