"""Seconds of ``tilewright.compile`` in a fresh process; ``python -m benchmarks.compile_time`` is that process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.results import CompileTimes

ROOT = Path(__file__).parent.parent


def measure(model: str, precision: str, backend: str | None, threads: int, repeats: int) -> CompileTimes:
    """Compiles ``repeats`` times with an empty cache folder, each followed by a second process with that folder."""
    cold, cached = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(_in_fresh_process(model, precision, backend, threads, folder))
            cached.append(_in_fresh_process(model, precision, backend, threads, folder))
    return CompileTimes(precision, tuple(cold), tuple(cached))


def _in_fresh_process(model: str, precision: str, backend: str | None, threads: int, folder: str) -> float:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--model", model, "--precision", precision]
    command += ["--threads", str(threads), "--cache", folder]
    command += ["--backend", backend] if backend else []
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1])["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--precision", "--cache"):
        parser.add_argument(name, required=True)
    parser.add_argument("--backend")
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    # The weights come from the usual cache folder: converting them is no part of compiling.
    model = models.load(given.model, given.precision)
    os.environ["TILEWRIGHT_CACHE"] = given.cache
    start = time.perf_counter()
    fast = models.compiled(model, given.precision, backend=given.backend)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "stages": dict(fast.report().seconds)}))


if __name__ == "__main__":
    main()
