"""Choosing between ways to build the same program by measurement, and remembering the choice on disk.

One candidate beside the generated matrix products is the vendor's library (oneDNN or cuBLAS through torch), which a
pass puts into the prefill program. Whoever is faster at a piece of prompt wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from tilewright import codegen
from tilewright.ir.module import Module
from tilewright.runtime.executor import EngineSpec, Executor
from tilewright.runtime.files import write_atomically
from tilewright.runtime.kv_state import RequestState

from .settings import cache_dir

_RUNS = 3
_TOKENS = 128  # enough rows that products are bound by arithmetic, as those of a full chunk are
_BEHIND = 1.5
_EARNED = 1.5


def choice_key(modules: Sequence[Module], backend: str, device: torch.device) -> str:
    """Names everything that a choice depends on: the candidates' IR, how kernels are printed, device, threads and
    library versions."""
    parts = (
        backend,
        torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        str(os.cpu_count()),
        str(torch.get_num_threads()),
        torch.__version__,
        _printers(),
        *map(str, modules),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def _processor() -> str:
    """The CPU's model name; where Linux does not tell it, what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = {line for line in lines if line.startswith(("model name", "CPU implementer", "CPU part"))}
    return " ".join((platform.machine(), *sorted(names or {platform.processor()})))


@lru_cache(maxsize=1)
def _printers() -> str:
    """A hash of the code that prints kernels, which is a quarter of a megabyte at most."""
    digest = hashlib.sha256()
    for folder in codegen.__path__:
        for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in (".py", ".h")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def remembered(key: str, candidates: int) -> int | None:
    """The candidate chosen before, or None where there is no such record or it cannot be trusted."""
    try:
        chosen = json.loads(_path(key).read_text())["chosen"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return chosen if isinstance(chosen, int) and 0 <= chosen < candidates else None


def remember(key: str, chosen: int, seconds: Sequence[float]) -> bool:
    """Record a choice and what was measured. False when the cache folder cannot be written; the choice still stands."""
    record = json.dumps({"chosen": chosen, "seconds": list(seconds)})
    try:
        write_atomically(_path(key), record)
    except OSError:
        return False
    return True


def _path(key: str) -> Path:
    return cache_dir() / "choices" / f"{key[:40]}.json"


def measure(executors: Sequence[Executor], spec: EngineSpec) -> list[float]:
    """Seconds that each prefill executor takes for a piece of prompt: the best of a few runs, taken in turns.

    The weights of a model do not stay in cache from one run to the next, so these are the times of real prompts.
    """
    tokens = min(spec.chunk, spec.max_length, _TOKENS)
    dims = {"B": 1, "S": tokens, "T": tokens, "L": 1}
    state = RequestState(spec, 1, max(1, _rows(spec)))
    ids = torch.arange(tokens, device=spec.device).remainder(max(spec.vocab_size, 1)).unsqueeze(0)
    positions = torch.arange(tokens, device=spec.device).unsqueeze(0)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": state.mask}
    outputs = {o.name: o.empty(dims, spec.device) for o in spec.outputs}

    def running(executor: Executor) -> Callable[[], None]:
        def run() -> None:
            executor.run(inputs, dims, state, outputs)
            _wait(spec.device)

        return run

    _wait(spec.device)
    return time_in_turns([running(e) for e in executors], _RUNS)


def time_in_turns(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Seconds of each run, the best of several rounds in which all take turns, since a machine's speed drifts.

    One that is clearly behind after its first turn is not run again; its one time stands.
    """
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for n, run in enumerate(runs):
            if best[n] != float("inf") and best[n] > _BEHIND * min(best):
                continue
            start = time.perf_counter()
            run()
            best[n] = min(best[n], time.perf_counter() - start)
    return best


def best(arenas: Sequence[int], seconds: Sequence[float]) -> int:
    """The number of the candidate to take: the fastest; one that needs clearly more memory has to be clearly faster.

    Between the vendor's products lie tensors that the generated kernels keep in registers.
    """
    least = min(arenas)
    weighed = [s * (_EARNED if a > 1.1 * least else 1.0) for a, s in zip(arenas, seconds, strict=True)]
    return weighed.index(min(weighed))


def _rows(spec: EngineSpec) -> int:
    return next((high for name, _, high in spec.symbols if name == "B"), 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
