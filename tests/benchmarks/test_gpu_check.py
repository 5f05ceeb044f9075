"""The check of a GPU: its parts on a tiny model, its limits, and the file that it writes after each."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tilewright as tw
from benchmarks import gpu_check, gpu_parts, peers, stored
from benchmarks.chart_results import Chart
from benchmarks.gpu_check import Check, ended, merged
from benchmarks.gpu_results import Found, GpuCheck
from benchmarks.gpu_scales import SCALES
from benchmarks.large_models import with_random_values
from benchmarks.step_gaps import StepGap
from benchmarks.torch_kernels import Kernel

from .sample_results import BF16, made_up_check
from .test_chart import run


def check(file: Path, seconds: float = 100) -> Check:
    empty = replace(made_up_check("tiny"), found=Found(), parts={})
    return Check(SCALES["tiny"], "cpu", time.monotonic() + seconds, empty, file)


def test_a_check_is_stored_and_read_again(tmp_path: Path) -> None:
    file = stored.save(made_up_check(), tmp_path / "c.json")
    assert stored.of_file(GpuCheck, file) == made_up_check()
    data = json.loads(file.read_text())
    del data["found"]["torch_kernels"]  # files have been without
    file.write_text(json.dumps(data))
    assert stored.of_file(GpuCheck, file).found.torch_kernels == ()


def test_every_kernel_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every program; and beside the products of the vendor's library."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "part.json"
    assert (
        run(gpu_parts.main, "kernels", "--scale", "tiny", "--device", "cpu", "--into", str(file)).exit_code
        == 0
    )
    found, said = gpu_parts.read(file)
    assert said.startswith("compiled in")
    programs = {k.program.removesuffix("_vendor") for k in found.kernels}
    assert programs == {"decode_b1", "decode_b2", "prefill"}
    assert all(len(k.seconds) == 5 and k.bytes > 0 for k in found.kernels)
    assert any(k.peer > 0 for k in found.kernels)


def test_every_kernel_is_set_beside_torch_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those at batch 1 first, what fails with its reason; when the time is over the others are named, and what was
    found before is in the file."""
    file, done = tmp_path / "part.json", []

    def seconds(kernel: Kernel) -> float:
        done.append(kernel.step.name)
        if len(done) == 2:
            raise RuntimeError("no such op")
        if len(done) == 3:
            assert [c.seconds for c in gpu_parts.read(file)[0].torch_kernels] == [1e-3, 0.0]
            now = time.monotonic()
            monkeypatch.setattr(gpu_parts.time, "monotonic", lambda: now + 1000)
        return 1e-3

    def compiled(*_: object) -> tuple[object, str]:
        source = with_random_values("tiny-llama", torch.device("cpu"), 64)
        return tw.compile(source, batch_sizes=(1, 2), max_length=64, backend="reference"), "compiled"

    monkeypatch.setattr(gpu_parts._Part, "_compiled", compiled)
    monkeypatch.setattr(gpu_parts.torch_kernels, "seconds", seconds)
    monkeypatch.setattr(gpu_parts.torch_kernels, "get_ready", lambda _: None)
    result = run(
        gpu_parts.main, gpu_parts.TORCH_KERNELS, "--scale", "tiny", "--device", "cpu", "--into", str(file)
    )
    assert result.exit_code == 0, result.output
    found, said = gpu_parts.read(file)
    assert [c.seconds for c in found.torch_kernels[:4]] == [1e-3, 0.0, 1e-3, 0.0]
    assert [c.why for c in found.torch_kernels[:4]] == ["", "RuntimeError: no such op", "", "no time left"]
    programs = [c.program.removesuffix("_vendor") for c in found.torch_kernels]
    assert list(dict.fromkeys(programs)) == ["decode_b1", "prefill", "decode_b2"]
    assert "RuntimeError: no such op" in said
    assert len(done) == 3


def test_parts_end_up_in_one_file(tmp_path: Path) -> None:
    """Two parts as the processes that they are, points of the chart among them."""
    file = tmp_path / "check.json"
    result = run(
        gpu_check.main, "--scale", "tiny", "--device", "cpu", "--parts", "rates,chart", "--output", str(file)
    )
    assert result.exit_code == 0, result.output
    found = stored.of_file(GpuCheck, file)
    assert list(found.parts) == ["rates", "chart"]
    assert found.found.bandwidth > 0
    assert found.found.half_flops > 0
    assert found.found.chart is not None
    (point,), (prompt,) = found.found.chart.points, found.found.chart.prompts
    assert (point.context, prompt.size, point.decode.of(BF16) is not None) == (16, 32, True)
    assert [g.system for g in found.found.chart.gaps] == [BF16]
    assert [f.name for f in tmp_path.iterdir()] == ["check.json"]


@pytest.mark.parametrize(
    ("status", "why", "output", "said"),
    [
        (0, "", "a::b PASSED\n=== 1 passed in 2.00s ===\n", "1 passed in 2.00s"),
        (
            1,
            "",
            "a::b FAILED [ 50%]\na::c PASSED\n= short test summary =\nFAILED a::b - no\n== 1 failed in 1s ==\n",
            "failed: 1 failed in 1s; a::b",
        ),
        (
            1,
            ", stopped after 9 s",
            "[gw1] [ 3%] FAILED a::b[x-1] \n[gw0] [ 6%] PASSED a::c \na::d ",
            "failed, stopped after 9 s: a::d; a::b[x-1]",
        ),
    ],
    ids=["passed", "failed", "stopped"],
)
def test_failed_tests_are_named(
    status: int, why: str, output: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where pytest had no time for its summary."""
    monkeypatch.setattr(gpu_check, "ended", lambda *_: gpu_check.Ended(status, output, why))
    assert check(tmp_path / "check.json").tests(9.0) == (Found(), said)


def test_what_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written after each part."""
    run_ = check(tmp_path / "check.json")
    monkeypatch.setattr(Check, "tests", lambda *_: 1 / 0)
    run_.part("tests")
    assert stored.of_file(GpuCheck, run_.file).parts == {
        "tests": "failed: ZeroDivisionError: division by zero"
    }
    monkeypatch.setattr(Check, "process", lambda *_: (Found(bandwidth=1.0), "fine"))
    run_.part("rates")
    found = stored.of_file(GpuCheck, run_.file)
    assert (found.parts["rates"], found.found.bandwidth, found.failed) == ("fine", 1.0, True)


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    run_ = check(tmp_path / "check.json", seconds=1)
    run_.part("rates")
    assert stored.of_file(GpuCheck, run_.file).parts == {"rates": "left out, the time is over"}


def test_a_part_has_what_is_left_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_, limits = check(tmp_path / "check.json", seconds=20), []
    monkeypatch.setattr(Check, "process", lambda _, __, limit: limits.append(limit) or (Found(), ""))
    run_.part("kernels")
    assert limits[0] <= 20


def test_a_process_that_takes_too_long_is_stopped_with_its_children() -> None:
    """What it had said until then is kept."""
    child = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    done = ended([sys.executable, "-c", child], 2)
    assert (
        time.monotonic() - start < 30
    )  # the child holds the pipe, so a living one would make this wait for it
    assert (done.status != 0, done.output.strip(), done.why) == (True, "begun", ", stopped after 2 s")


def test_what_a_stopped_part_had_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Found(bandwidth=3.0)

    def stopped(command: list[str], _: float) -> gpu_check.Ended:
        into = Path(command[command.index("--into") + 1])
        gpu_parts._Part(SCALES["tiny"], torch.device("cpu"), into, found).keep()
        return gpu_check.Ended(-9, "one\ntwo\n", ", stopped after 1 s")

    monkeypatch.setattr(gpu_check, "ended", stopped)
    run_ = check(tmp_path / "check.json")
    run_.part("rates")
    assert run_.result.found.bandwidth == 3.0
    assert run_.result.parts["rates"] == "failed, stopped after 1 s: two"


def test_nothing_asks_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    done = ended([sys.executable, "-c", "import os; print(os.environ['HF_HUB_OFFLINE'])"], 60)
    assert done.output.strip() == "1"


def test_findings_are_joined() -> None:
    one, two = made_up_check().found, Found(half_flops=5.0, gaps=(StepGap(2, 1.0, 1.0),))
    both = merged(one, two)
    assert (both.bandwidth, both.half_flops, len(both.gaps), both.chart) == (4e9, 5.0, 2, one.chart)


def test_the_parts_of_a_gpu_fit_the_plan() -> None:
    """What is chosen of the chart exists, and every part that the plan gives time to is known."""
    for name, plan in SCALES.items():
        assert set(plan.seconds) - {"tests", "chart", "chart, torch.compile"} == set(gpu_parts.PARTS), name
        assert gpu_check._chosen("", plan) == list(plan.seconds)
        assert gpu_check._chosen("chart, torch.compile,tuned", plan) == ["tuned", "chart, torch.compile"]
        assert gpu_check._chosen("kernels,torch.compile,chart", plan) == ["chart", gpu_parts.TORCH_KERNELS]


def test_a_file_is_shown(tmp_path: Path) -> None:
    file = stored.save(made_up_check(), tmp_path / "c.json")
    result = run(gpu_check.main, "--show", str(file))
    assert result.exit_code == 0, result.output
    for said in ("of floor", "matmul_1", "50%", "torch.compile", "4000.0", "Targets", "tests: 3 passed"):
        assert said in result.output
    stored.save(made_up_check().found.chart or Chart, file)
    assert run(gpu_check.main, "--show", str(file)).exit_code != 0


def test_a_gap_is_what_the_model_does_not_take() -> None:
    assert StepGap(1, token=2e-3, model=1.5e-3).share == pytest.approx(0.25)
    assert StepGap(1, token=1e-3, model=1.1e-3).share == 0.0
    assert StepGap(1, token=1e-3, model=1.01e-3).known
    assert not StepGap(1, token=1e-3, model=1.1e-3).known  # noise larger than any share that matters
    assert not StepGap(1, token=-1e-6, model=1e-3).known  # more of it: the longer run was the faster one


def test_the_vendor_is_asked_for_the_same_work() -> None:
    """Products and attention have a peer, other kernels have none."""
    fast = tw.compile(
        with_random_values("tiny-opt", torch.device("cpu"), 64), max_length=64, backend="reference"
    )
    program = fast._tilewright.engine.decode_executors[1].program
    dims = {"B": 1, "S": 1, "L": 1, "T": 16}
    times = {s.name: peers.of(s, dims, torch.device("cpu")) for s in program.kernels()}
    assert all((times[name] > 0) == ("matmul" in name or "attention" in name) for name in times)
