"""A made-up run of the benchmark, for tests of what reads one."""

from __future__ import annotations

from benchmarks.results import CompileTimes, Measure, MemoryUse, Results


def made_up(date: str = "2026-01-02T03:04:05+00:00", ours: float = 1.0) -> Results:
    decode = Measure(
        "decode", "f32", 64, 10, (ours, 2 * ours), (3.0, 6.0), (4e9, 2e9), bytes_per_token=200_000_000
    )
    return Results(
        date=date,
        command="python -m benchmarks.cpu --repeats 2",
        model="smollm2",
        machine={"cpu": "Some CPU @ 3.00GHz", "cores": 2, "extensions": ["avx2"], "load": 0.1},
        versions={"torch": "2.0", "transformers": "5.0", "python": "3.11.1"},
        settings={"threads": 2},
        measures=(
            decode,
            Measure("prefill", "f32", 512, 512, (1.0, 1.0), (2.0, 2.0), (4e9, 4e9)),
            Measure("first token", "bf16", 64, 1, (0.1, 0.1), (0.2, 0.2), (4e9, 4e9)),
        ),
        compile_times=(CompileTimes("f32", (20.0,), (2.0,)),),
        memory=(MemoryUse("f32", 512, 1 << 20, 2 << 20, 4 << 20, 0),),
    )
