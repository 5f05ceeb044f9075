"""Estimates and offline compilation of the large models, from their shapes alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import estimates, offline
from benchmarks.large_models import BUILDERS, without_values
from tilewright.codegen.triton.device import H100
from tilewright.errors import OptionError
from tilewright.ir.program import Program


def run(main: object, *arguments: str) -> tuple[int, str]:
    import typer

    app = typer.Typer()
    app.command()(main)  # type: ignore[arg-type]
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output + (repr(result.exception) if result.exception else "")


def test_a_decode_step_of_a_7b_model_is_near_its_floor() -> None:
    """All layers count; the floor is that of the bytes; the products are nearly all of it."""
    (decode, prefill) = estimates.plans("llama2-7b", "bf16", [1], 1024)
    report = estimates.phase_report(decode, 1024, H100)
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096)
    kv = 2 * 2 * 32 * 1024 * 4096
    assert weights + kv < report.bytes < 1.01 * (weights + kv)
    assert report.floor_seconds == pytest.approx(report.bytes / H100.bandwidth, rel=0.01)
    assert report.floor_seconds < report.estimated_seconds < 1.4 * report.floor_seconds
    assert report.kernels_per_layer == 6
    assert prefill.phase == "prefill"


def test_the_command_prints_kernels_steps_and_tiles_by_rows() -> None:
    code, text = run(estimates.main, "--model", "opt-6.7b", "--precision", "int4", "--batch-sizes", "1,8")
    assert code == 0
    for words in ("Kernels of decode_b8", "not measured", "tokens/s (estimate)", "Tile by rows", "vector"):
        assert words in text


def test_every_kernel_is_compiled_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    arguments = ("--model", "llama2-7b", "--precision", "int8", "--device", "h100", "--batch-sizes", "64")
    command = [sys.executable, "-m", "benchmarks.offline", *arguments, "--output", str(path)]
    done = subprocess.run(
        command, cwd=Path(offline.__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (kernels,) = json.loads(path.read_text())["kernels"].values()
    assert {k["program"] for k in kernels} == {"decode_b64", "prefill"}
    assert all(k["fits"] and k["stack"] == 0 for k in kernels)
    assert any(k["wgmma"] for k in kernels)


@pytest.mark.parametrize("name", BUILDERS)
def test_models_have_their_own_numbers_and_no_memory(name: str) -> None:
    model = without_values(name)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert f"{billions:.1f}" in {"llama2-7b": "6.7", "llama2-13b": "13.0", "opt-6.7b": "6.7"}[name]
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(OptionError, match="'llama3' is none of llama2-7b"):
        without_values("llama3")
    code, text = run(estimates.main, "--device", "h200x")
    assert code != 0
    assert "h200x" in text


@pytest.mark.parametrize("name", ["llama2-13b", "opt-6.7b"])
def test_a_layer_has_few_kernels(name: str) -> None:
    """Six at most in a decode step, whatever is split to fill the GPU, and seven in a prompt, whose norms are kernels
    of their own."""
    programs = {p.name: p for p in estimates.plans(name, "bf16", [1, 4, 16, 32, 64], 1024, layers=1)}
    counts = {n: sum(step.name.startswith("layer") for step in p.kernels()) for n, p in programs.items()}
    prompt = counts.pop("prefill")
    assert len(counts) == 5
    assert max(counts.values()) <= 6, counts
    assert 1 < prompt <= 7
    assert _products_that_reduce(programs["decode_b1"]) >= 2
    assert _products_that_reduce(programs["prefill"]) == 0


def _products_that_reduce(program: Program) -> int:
    """Kernels of a layer that take a norm's sum on the way into a product."""
    bodies = [{op.opcode for op in s.op.body} for s in program.kernels() if s.name.startswith("layer")]
    return sum({"matmul", "reduce"} <= body for body in bodies)
