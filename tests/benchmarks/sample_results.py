"""Made-up runs of the benchmarks, for tests of what reads them."""

from __future__ import annotations

from typing import Any

from benchmarks.chart_results import Chart, Point, Prompt
from benchmarks.gpu_results import CompiledKernel, Found, GpuCheck, KernelTime, LayerTime
from benchmarks.quality_results import Closeness, QualityResults, Similarity
from benchmarks.results import (
    EAGER,
    OURS,
    TORCH_COMPILE,
    CompileTimes,
    Measure,
    MemoryUse,
    Results,
    Series,
)
from benchmarks.step_gaps import StepGap

MACHINE: dict[str, Any] = {"cpu": "Some CPU @ 3.00GHz", "cores": 2, "extensions": ["avx2"], "load": 0.1}
VERSIONS = {"torch": "2.0", "transformers": "5.0", "python": "3.11.1"}


def made_up(date: str = "2026-01-02T03:04:05+00:00", ours: float = 1.0) -> Results:
    """Two rounds of everything. Decoding in f32 has all four systems, int8 ours and llama.cpp."""
    probe, size = (4e9, 2e9), 200_000_000
    decode = Measure(
        "decode", "f32", 64, 10, probe,
        (
            Series("tilewright", (ours, 2 * ours), 1, size),
            Series("Hugging Face eager", (3.0, 6.0), 1, size),
            Series("torch.compile", (2.0, 4.0), 1, size),
            Series("llama.cpp", (1.25, 2.5), 1, size),
        ),
    )  # fmt: skip
    int8 = Measure(
        "decode", "int8", 64, 10, probe,
        (Series("tilewright", (0.5, 1.0), 1, 50_000_000), Series("llama.cpp", (0.5, 1.5), 1, 40_000_000)),
    )  # fmt: skip
    prefill = Measure(
        "prefill", "f32", 512, 512, probe,
        (Series("tilewright", (1.0, 1.0)), Series("Hugging Face eager", (2.0, 2.0))),
    )  # fmt: skip
    first = Measure(
        "first token", "bf16", 64, 1, probe,
        (Series("tilewright", (0.1, 0.1)), Series("Hugging Face eager", (0.2, 0.2))),
    )  # fmt: skip
    batched = Measure(
        "batched decode", "bf16", 64, 10, probe,
        (Series("tilewright", (1.0, 1.0), 1, size), Series("tilewright", (2.0, 2.0), 8, size)),
    )  # fmt: skip
    return Results(
        date=date,
        command="python -m benchmarks.cpu --repeats 2",
        model="smollm2",
        machine=MACHINE,
        versions=VERSIONS | {"llama-cpp-python": "0.3"},
        settings={"threads": 2},
        measures=(decode, prefill, first, batched, int8),
        compile_times=(CompileTimes("f32", (20.0,), (2.0,)),),
        memory=(MemoryUse("f32", 512, 1 << 20, 2 << 20, 4 << 20, 0),),
        left_out=("torch.compile, bf16: no time",),
    )


def made_up_quality(date: str = "2026-01-02T03:04:05+00:00") -> QualityResults:
    """Two windows; the reference, and ours at one precision."""
    return QualityResults(
        date=date,
        command="python -m benchmarks.quality",
        model="smollm2",
        machine=MACHINE,
        versions=VERSIONS,
        settings={"threads": 2, "windows": 2, "length": 101, "through": "decode", "batch": 2, "pairs": 40},
        closeness=(
            Closeness("Hugging Face eager", "f32", (1.0, 2.0), (0.0, 0.0), (1.0, 1.0)),
            Closeness("tilewright", "int8", (1.5, 2.5), (0.01, 0.03), (0.9, 1.0)),
        ),
        similarity=(Similarity("tilewright", "int8", 0.998, 0.002, 0.01),),
    )


BF16 = f"{OURS} bf16"
PROBE = (4e9, 4e9, 4e9)
SOME_GPU = MACHINE | {"device": "Some GPU"}


def point(
    model: str = "tiny-llama", batch: int = 1, ours: float = 1.0, context: int = 16, **others: float
) -> Point:
    """Ten tokens, in 4 s by eager and in ``ours`` by bf16; others: seconds of torch_compile, int8 and int4."""
    names = {"torch_compile": TORCH_COMPILE, "int8": f"{OURS} int8", "int4": f"{OURS} int4"}
    seconds = {EAGER: 4.0, BF16: ours} | {names[name]: s for name, s in others.items()}
    series = tuple(Series(name, (s, s, s), batch, 100_000_000) for name, s in seconds.items())
    decode = Measure("decode", "bf16", context, 10, PROBE, series)
    return Point(model, batch, context, decode, {}, {BF16: 4096}, 65536, "2026-01-02T03:04:05+00:00", "abc")


def prompt(model: str = "tiny-llama", size: int = 16, torch_compile: float = 0.003) -> Prompt:
    """4 ms by eager and 2 ms by bf16, to the first token and for the forward."""
    both = (Series(EAGER, (0.004,)), Series(BF16, (0.002,)))
    first = Measure("first token", "bf16", size, 1, PROBE[:1], both)
    forward = Measure(
        "prefill", "bf16", size, size, PROBE[:1], (*both, Series(TORCH_COMPILE, (torch_compile,)))
    )
    return Prompt(model, size, first, forward, "2026-01-03T03:04:05+00:00", "abc")


def made_up_chart(
    *points: Point,
    date: str = "2026-01-02T03:04:05+00:00",
    scale: str = "tiny",
    prompts: tuple[Prompt, ...] = (),
) -> Chart:
    """A chart of a device that does not exist."""
    return Chart(date, "python -m benchmarks.chart", scale, SOME_GPU, VERSIONS, points, prompts)


def made_up_check(scale: str = "paper", seconds: float = 2e-3) -> GpuCheck:
    """One kernel of 4 MB on a device that reads 4 GB/s: its floor is 1 ms."""
    kernel = KernelTime("decode_b1", False, "matmul_1", (seconds, seconds), 4_000_000, 1000, 0.0, 3e-3)
    found = Found(
        bandwidth=4e9,
        half_flops=1e12,
        kernels=(kernel,),
        torch_kernels=(CompiledKernel("decode_b1", "matmul_1", 4_000_000, 1000, 4e-3),),
        layers=(
            LayerTime(EAGER, "decode", 1, 64, 10, (0.01,)),
            LayerTime(BF16, "decode", 1, 64, 10, (0.005,)),
        ),
        gaps=(StepGap(1, token=1e-3, model=0.99e-3),),
        compile_times=CompileTimes("bf16", (25.0,), (4.0,)),
        chart=made_up_chart(point("llama2-7b", context=1024), scale=scale),
    )
    return GpuCheck(
        "2026-01-02T03:04:05+00:00", "python -m benchmarks.gpu_check", scale, SOME_GPU, VERSIONS, found,
        {"tests": "3 passed"},
    )  # fmt: skip
