"""Every hand-built kernel through generated C++, against float64: no further from it than eager PyTorch's dtype is."""

from __future__ import annotations

import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests.strategies import Case as Random
from tests.strategies import examples, modules
from tilewright.codegen.cpp import build
from tilewright.codegen.cpp.expression import OPS
from tilewright.codegen.cpp.kernel import candidates, print_kernel
from tilewright.codegen.cpp.program import print_program
from tilewright.codegen.tunables import Changes, Tunables
from tilewright.ir.module import Loc, Module, Op
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.reference import evaluate

from .cpp_run import ALL, case_of, executor_of, program_of_cases, run_case
from .kernel_case import CAPACITY, Case, comparable, known
from .random_programs import check_random, worst_excess
from .triton_cases import CASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel cache for this module."""
    path = tmp_path_factory.mktemp("kernels")
    path.chmod(0o700)
    return path


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_case(name: str, threads: int, folder: Path) -> None:
    check_case(name, ALL, threads, folder)


def has_simde() -> bool:
    """Whether the AVX-512 paths can be emulated here."""
    flags = Path("/proc/cpuinfo")
    avx2 = flags.exists() and {"avx2", "fma", "f16c"} <= set(flags.read_text(encoding="utf-8").split())
    return avx2 and Path("/usr/include/simde/x86/avx512.h").exists()


# One of each kind: other processors take other paths through the headers.
SOME = tuple(
    next(name for name in CASES if name.startswith(kind))
    for kind in (
        "linear-f32", "linear-bf16", "even_linear-bf16-four", "wide_linear-bf16", "linear-f16",
        "between_others-bf16-four", "layer_norm-f32", "attention", "attention-bf16", "attention_long-bf16", "merge",
        "quantized-int8-blocks", "quantized-int4-blocks", "quantized_prompt-int8", "quantized_prompt-int4",
        "rounded-int8", "rounded-int8_groups", "rounded-int4", "causal_conv1d-bf16",
        "selective_scan-f32", "linear_attention-bf16", "batched_heads-bf16", "batched_values-f32",
    )
)  # fmt: skip
WITHOUT_AMX = ("-mno-amx-bf16",)
WITHOUT_BF16 = (*WITHOUT_AMX, "-mno-avx512bf16")
WITHOUT_VNNI = (*WITHOUT_BF16, "-mno-avx512vnni", "-mno-avxvnni")
AVX2 = ("-mno-avx512f",)
BASELINE = ("-march=x86-64",)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize(
    "flags",
    [WITHOUT_AMX, WITHOUT_BF16, WITHOUT_VNNI, AVX2, BASELINE],
    ids=["bf16", "vnni", "avx512", "avx2", "baseline"],
)
def test_older_processors(flags: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels, compiled for less than this machine offers."""
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    for name in SOME:
        check_case(name, SOME, 2, folder)


EMULATOR = Path(__file__).parent / "include" / "emulated_avx512.h"
EMULATED = {
    "avx512": (),
    "vnni": ("-DEMULATE_VNNI",),
    "vnni and bf16": ("-DEMULATE_VNNI", "-DEMULATE_BF16"),
    "vnni, bf16 and amx": ("-DEMULATE_VNNI", "-DEMULATE_BF16", "-DEMULATE_AMX"),
}


@pytest.mark.skipif(not has_simde(), reason="needs x86 with AVX2 and SIMDe (Debian and Ubuntu: libsimde-dev)")
@pytest.mark.parametrize("extensions", EMULATED)
def test_emulated_avx512(extensions: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels by the AVX-512 paths of the headers, whatever this machine has."""
    plain = [f for f in build.FLAGS if f not in ("-march=native", "-O3")]
    added = ["-O1", "-mavx2", "-mfma", "-mf16c", "-include", str(EMULATOR), *EMULATED[extensions]]
    monkeypatch.setattr(build, "FLAGS", (*plain, *added))
    for name in SOME:
        check_case(name, SOME, 2, folder)


PRODUCTS = tuple(name for name in CASES if name.startswith(("linear", "gated", "qkv")))


@pytest.mark.parametrize("number", range(1, 4))
def test_every_walk_that_a_tuner_may_try(number: int, folder: Path) -> None:
    """Other unrolls, rows side by side and tiles change the time of a product, not what it computes."""
    tunables = {name: ways[min(number, len(ways) - 1)] for name, ways in walks().items()}
    assert any(tunables.values())
    for name in PRODUCTS:
        check_case(name, PRODUCTS, 2, folder, tunables)


@pytest.mark.parametrize("name", ["linear-bf16-many", "batched_values-bf16-False"])
@pytest.mark.parametrize("rows", [16, 20, 32])
def test_rows_in_several_blocks(rows: int, name: str, folder: Path) -> None:
    """38 rows, or 19 in each product of a batch, prepared so many at a time, in scratch that has room for no more."""
    check_case(name, (name,), 2, folder, {name: {"row_block": rows}})


def walks() -> dict[str, tuple[Changes, ...]]:
    return {name: candidates(case_of(name, PRODUCTS).kernel) for name in PRODUCTS}


def test_a_walk_is_offered_where_there_is_a_choice() -> None:
    ways = walks()
    assert ways["linear-f32-one"] == ({}, {"unroll": 2}, {"unroll": 8}, {"weight_rows": 2})
    assert {"tile_rows": 4} in ways["linear-f32-many"]
    assert candidates(CASES["softmax"]().kernel) == ({},)


def check_case(
    name: str, among: tuple[str, ...], threads: int, folder: Path, tunables: Tunables | None = None
) -> None:
    """Run a case, built together with the cases ``among``, and compare it with float64."""
    case = case_of(name, among)
    found = run_case(name, folder, threads, among, tunables)
    wrong = [differences(case, module, found) for module in case.meanings()]
    assert not all(wrong), wrong


def differences(case: Case, module: Module, found: tuple[Tensor, ...]) -> list[str]:
    """The results that are not what ``module`` computes."""
    plain = evaluate(module, case.inputs(), {}, case.dims, case.past())
    exact = evaluate(module, case.inputs(), {}, case.dims, case.exact_past(), exact=True)
    wrong = []
    for value, ours, theirs, truth in zip(case.kernel.results, found, plain, exact, strict=True):
        ours, theirs = comparable(ours), comparable(theirs)
        if not ours.is_floating_point():
            right = torch.equal(ours, theirs)
        else:
            right = _as_close(known(truth, ours, theirs), ours.dtype)
        wrong += [] if right else [f"{value}: {ours} is not {truth}"]
    return wrong


def _as_close(numbers: tuple[Tensor, ...] | None, dtype: torch.dtype) -> bool:
    """Whether truth, ours and theirs, as ``known`` gives them, say that ours is as close to the truth as theirs."""
    if numbers is None:
        return False
    truth, ours, theirs = numbers
    finite = torch.isfinite(ours).all() or not torch.isfinite(truth).all()
    return not truth.numel() or (bool(finite) and worst_excess(ours, theirs, truth, dtype) <= 0)


def test_every_pointwise_op_is_printed() -> None:
    assert set(OPS) == set(POINTWISE)


REDUCTION = re.compile(r"^( *)for \(long (k\d+) = .*?^\1\}", re.MULTILINE | re.DOTALL)


def test_nothing_is_reduced_again_and_again() -> None:
    """A reduction within the loop of another one depends on it. A LayerNorm's mean, computed anew for every term of the
    variance, took most of an encoder's time."""
    text = print_program(program_of_cases({name: case() for name, case in CASES.items()}))
    found = 0
    for outer in REDUCTION.finditer(text):
        header, inside = outer[0].split("\n", 1)
        found += 1
        for inner in REDUCTION.finditer(inside):
            assert re.search(rf"\b{outer[2]}\b", inner[0]), f"{header}\n{inside}"
    assert found > 10


@pytest.mark.parametrize(
    "name", ["batched-bf16", "batched_heads-bf16-20", "batched_values-f32-False", "batched_values-bf16-True"]
)
def test_products_of_a_batch_are_tiled(name: str) -> None:
    """Element by element, DeBERTa's scores by distance took twelve times as long."""
    assert "tw::gemm<" in print_program(program_of_cases({name: CASES[name]()}))


def test_kernels_say_where_they_come_from() -> None:
    """The comment above a kernel names its ops and the model's modules and source lines."""
    case = CASES["linear-f32-many"]()
    body = tuple(replace(op, loc=Loc("mlp.up", "model.py:7")) for op in case.kernel.body)
    text = print_program(program_of_cases({"up": replace_kernel(case, replace(case.kernel, body=body))}))
    assert "// up: matmul" in text
    assert "mlp.up (model.py:7)" in text


def replace_kernel(case: Case, kernel: Op) -> Case:
    main = case.module.main.with_ops((kernel,))
    return replace(case, module=case.module.with_functions((main,)))


def test_source_is_deterministic() -> None:
    cases = {name: make() for name, make in CASES.items()}
    assert print_program(program_of_cases(cases)) == print_program(program_of_cases(cases))


@examples(4)
@given(case=modules())
def test_random_program_keeps_its_meaning(case: Random, folder: Path) -> None:
    """A random module through the whole pipeline and C++ equals the reference evaluator."""
    check_random(case, lambda program, weights: executor_of(program, weights, folder))


def test_scratch_is_reserved_for_every_product() -> None:
    """A kernel whose products have one weight per column here and two there, with scratch for one of them alone: more
    weights share fewer columns, so either may take more."""
    several = False
    for name in ALL:
        program = program_of_cases({name: CASES[name]()})
        if any(op.opcode in ("experts_order", "grouped_matmul") for op in program.kernels()[0].op.body):
            continue  # of a GPU alone
        symbols = tuple(symbol for symbol, _, _ in program.symbols)
        kernel = print_kernel(program.kernels()[0], CAPACITY, symbols)
        used = set(re.findall(r"tw::gemm<W, (\d+)", kernel.text))
        reserved = set(re.findall(r"gemm_floats<[^>]*>\(\w+, (\d+)\)", " ".join(kernel.workspace.private)))
        assert used <= reserved, name
        several = several or len(used) > 1
    assert several
