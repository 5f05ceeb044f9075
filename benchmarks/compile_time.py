"""Seconds of ``tilewright.compile`` in a fresh process; ``python -m benchmarks.compile_time`` is that process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import large_models, models
from benchmarks.results import CompileTimes

ROOT = Path(__file__).parent.parent


def measure(model: str, precision: str, backend: str | None, threads: int, repeats: int) -> CompileTimes:
    """Compiles ``repeats`` times with an empty cache folder, each followed by a second process with that folder."""
    *_, times = steps(model, precision, backend, threads, repeats)
    return times


def steps(
    model: str, precision: str, backend: str | None, threads: int, repeats: int, device: str = "cpu"
) -> Iterator[CompileTimes]:
    """What is known after each of these processes. model: a name of ``models.load``, or of ``large_models``, which is
    made with random weights on ``device``."""
    cold: list[float] = []
    cached: list[float] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for seconds in (cold, cached):
                seconds.append(_in_fresh_process(model, precision, backend, threads, folder, device))
                yield CompileTimes(precision, tuple(cold), tuple(cached))


def _in_fresh_process(
    model: str, precision: str, backend: str | None, threads: int, folder: str, device: str
) -> float:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--model", model, "--precision", precision]
    command += ["--threads", str(threads), "--cache", folder, "--device", device]
    command += ["--backend", backend] if backend else []
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1])["seconds"])


def _source(name: str, precision: str, device: str) -> Any:
    if name in (*large_models.BUILDERS, *large_models.TINY):
        return large_models.with_random_values(name, torch.device(device), 0)
    return models.load(name, precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--precision", "--cache"):
        parser.add_argument(name, required=True)
    parser.add_argument("--backend")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    # The weights come from the usual cache folder: converting them is no part of compiling.
    model = _source(given.model, given.precision, given.device)
    os.environ["TILEWRIGHT_CACHE"] = given.cache
    os.environ["TRITON_CACHE_DIR"] = str(
        Path(given.cache) / "triton"
    )  # an empty cache is empty of Triton's too
    start = time.perf_counter()
    fast = models.compiled(model, given.precision, backend=given.backend)
    if given.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "stages": dict(fast.report().seconds)}))


if __name__ == "__main__":
    main()
