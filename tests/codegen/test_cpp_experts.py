"""The C++ kernel of experts against float64, on layers of hostile sizes."""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.experts_cases import CASES, ExpertsCase
from tilewright.codegen.cpp import build
from tilewright.codegen.cpp.program import print_program
from tilewright.costs import step_cost
from tilewright.ir.errors import VerifyError
from tilewright.ir.program import Program
from tilewright.ir.reference import evaluate
from tilewright.ir.types import DType
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes
from tilewright.passes.plan_memory import plan_memory
from tilewright.runtime.native import NativeLibrary

from .cpp_run import executor_of, library_of, program_of_cases, run_one_of
from .kernel_case import Case
from .random_programs import worst_excess

ALL = tuple(CASES)
SOME = (
    "odd sizes",
    "bf16",
    "bf16, many tokens",
    "transposed, odd and wide in bf16",
    "clamped, all of it in bf16",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel cache for this module."""
    path = tmp_path_factory.mktemp("kernels")
    path.chmod(0o700)
    return path


def one_kernel(name: str) -> Case:
    """A layer as its one kernel."""
    case = CASES[name]
    return Case(run_passes(case.module()), {"B": case.tokens}, case.inputs())


@lru_cache
def program_of(among: tuple[str, ...]) -> tuple[dict[str, Case], Program]:
    """All layers as kernels of one program: the headers take longer to compile than a layer does."""
    cases = {name: one_kernel(name) for name in among}
    return cases, program_of_cases(cases)


@lru_cache
def library(among: tuple[str, ...], folder: Path, flags: tuple[str, ...]) -> NativeLibrary:
    """``flags``: those that the compiler is given now, part of the key."""
    return library_of(program_of(among)[1], folder)


def run(
    name: str, inputs: dict[str, Tensor], threads: int, folder: Path, among: tuple[str, ...] = ALL
) -> Tensor:
    cases, program = program_of(among)
    (out,) = run_one_of(cases, name, program, library(among, folder, build.FLAGS), threads, inputs)
    return out


def check(name: str, threads: int, folder: Path, among: tuple[str, ...] = ALL) -> None:
    case = CASES[name]
    inputs, dims, module = case.inputs(), {"B": case.tokens}, case.module()
    found = run(name, inputs, threads, folder, among)
    (plain,), (exact,) = evaluate(module, inputs, {}, dims), evaluate(module, inputs, {}, dims, exact=True)
    assert worst_excess(found, plain, exact, found.dtype) <= 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_experts(name: str, threads: int, folder: Path) -> None:
    check(name, threads, folder)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-march=x86-64",)], ids=["avx2", "baseline"])
def test_older_processors(flags: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels, compiled for less than this machine offers."""
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    for name in SOME:
        check(name, 2, folder, SOME)


@pytest.mark.parametrize("name", ["nobody chose the first and the last", "more pairs than a block"])
def test_what_nobody_chose_is_not_read(name: str, folder: Path) -> None:
    inputs = CASES[name].inputs()
    inputs["ids"] = inputs["ids"].clamp(1, 4)
    before = run(name, inputs, 2, folder)
    for weights in ("gate_up", "down"):
        inputs[weights][[0, -1]] = float("nan")
    after = run(name, inputs, 2, folder)
    assert torch.isfinite(after).all()
    assert torch.equal(before, after)


def test_results_do_not_depend_on_the_number_of_threads(folder: Path) -> None:
    """A column is summed by one thread, over experts in order."""
    inputs = CASES["more pairs than a block"].inputs()
    one, three = (run("more pairs than a block", inputs, n, folder) for n in (1, 3))
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)


def test_the_cost_counts_chosen_experts() -> None:
    """Of 6 experts, two tokens with two each read four at most; ten tokens read all six."""
    case = ExpertsCase(10, 2, 6, 32, 16)
    (step,) = plan_memory(run_passes(case.module()), "experts", "forward", 0, 16).kernels()

    def expected(tokens: int, read: int) -> int:
        activations = tokens * (2 * 32 * 4 + 2 * (8 + 4))
        return activations + read * 3 * 32 * 16 * 4

    assert step_cost(step, {"B": 2}).bytes == expected(2, 4)
    assert step_cost(step, {"B": 10}).bytes == expected(10, 6)
    assert step_cost(step, {"B": 2}).flops == 2 * 2 * 2 * 3 * 32 * 16


def test_grouped_experts_are_refused_by_name() -> None:
    module = run_passes(CASES["odd sizes"].module(), PassOptions(group_experts=16))
    with pytest.raises(VerifyError, match="experts_order has no C\\+\\+ form"):
        print_program(plan_memory(module, "experts", "forward", 0, 16))


def test_float64_takes_ordinary_kernels(folder: Path) -> None:
    case = replace(CASES["odd sizes"], dtype=DType.f64, scores=DType.f64)
    program = plan_memory(run_passes(case.module()), "wide", "forward", 0, 16)
    assert not any(op.opcode == "experts" for step in program.kernels() for op in step.op.body)
    inputs, out = case.inputs(), torch.empty(case.tokens, case.depth, dtype=torch.float64)
    executor_of(program, {}, folder).run(inputs, {"B": case.tokens}, None, {"output0": out})
    (expected,) = evaluate(case.module(), inputs, {}, {"B": case.tokens})
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
