"""The comparison of two result files, each against its own floor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare, stored
from benchmarks.compare import changes
from benchmarks.results import OURS
from tilewright.errors import OptionError

from .sample_results import PROBE, made_up, made_up_chart, made_up_check, point, prompt
from .test_chart import run


def test_a_loss_against_the_own_floor_is_found(tmp_path: Path) -> None:
    """Twice the time at the same bandwidth is a loss; half the speed on half the bandwidth is none."""
    before = stored.save(made_up_chart(point()), tmp_path / "before.json")
    slower = stored.save(made_up_chart(point(ours=2.0)), tmp_path / "slower.json")
    halved = point(ours=2.0)
    halved = replace(halved, decode=replace(halved.decode, probe=tuple(p / 2 for p in PROBE)))
    same = stored.save(made_up_chart(halved), tmp_path / "same.json")
    (loss,) = changes(before, slower)
    assert (loss.ratio, loss.certain, loss.before.beside) == (0.5, True, "floor")
    assert [c.ratio for c in changes(before, same)] == [1.0]
    assert run(compare.main, str(before), str(slower)).exit_code == 1
    assert run(compare.main, str(before), str(same)).exit_code == 0
    assert run(compare.main, str(before), str(slower), "--tolerance", "0.6").exit_code == 0


def test_prompts_are_compared_too(tmp_path: Path) -> None:
    """Against eager, as the bytes of a prompt are no floor."""
    files = [
        stored.save(made_up_chart(prompts=(prompt(),)), tmp_path / name) for name in ("a.json", "b.json")
    ]
    assert {(c.before.what, c.before.beside) for c in changes(*files)} == {
        (f"tiny-llama {task}, batch 1, 16 tokens", "Hugging Face eager")
        for task in ("first token", "prefill")
    }


def test_kernels_of_checks_are_compared(tmp_path: Path) -> None:
    """A kernel against its floor at the peaks of its own run, and the points of the chart inside."""
    files = [stored.save(made_up_check(seconds=s), tmp_path / f"{s}.json") for s in (2e-3, 4e-3)]
    slower, same = changes(*files)
    assert (slower.before.what, slower.ratio) == ("kernel decode_b1: matmul_1", pytest.approx(0.5))
    assert (same.before.what, same.ratio) == ("llama2-7b decode, batch 1, 1024 tokens", 1.0)
    faster_device = made_up_check()
    found = replace(faster_device.found, bandwidth=8e9, kernels=made_up_check(seconds=1e-3).found.kernels)
    third = stored.save(replace(faster_device, found=found), tmp_path / "third.json")
    assert changes(files[0], third)[0].ratio == pytest.approx(1.0)


def test_speed_results_are_compared_too(tmp_path: Path) -> None:
    files = [stored.save(made_up(ours=t), tmp_path / f"{t}.json") for t in (1.0, 1.5)]
    found = changes(*files)
    assert found[0].before.what == "decode 64, f32"
    assert found[0].ratio == pytest.approx(1 / 1.5)
    assert {c.before.system.split(",")[0] for c in found} == {OURS}


@pytest.mark.parametrize("text", ["", "[1]", '{"kind": "quality"}', '{"kind": "chart", "schema": 99}'])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.json", stored.save(made_up_chart(point()), tmp_path / "good.json")
    bad.write_text(text)
    with pytest.raises(OptionError, match="bad"):
        changes(good, bad)
