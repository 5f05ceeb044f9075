"""Made-up runs of the benchmarks, for tests of what reads them."""

from __future__ import annotations

from typing import Any

from benchmarks.quality_results import Closeness, QualityResults, Similarity
from benchmarks.results import CompileTimes, Measure, MemoryUse, Results, Series

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
