"""Choosing between ways to build the same program by measurement, and remembering the choice on disk.

One candidate beside the generated matrix products is the vendor's library (oneDNN or cuBLAS through torch), which a
pass puts into the prefill program. Whoever is faster at a piece of prompt wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tilewright.ir.module import Module
from tilewright.runtime.executor import EngineSpec, Executor
from tilewright.runtime.kv_state import RequestState

from .settings import cache_dir

_RUNS = 3
_TOKENS = 128  # enough rows that products are bound by arithmetic, as those of a full chunk are
_BEHIND = 1.5


def choice_key(modules: Sequence[Module], backend: str, device: torch.device) -> str:
    """Names everything that a choice depends on: the candidates' IR, device, threads and library versions."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    parts = (
        backend,
        name,
        str(os.cpu_count()),
        str(torch.get_num_threads()),
        torch.__version__,
        *map(str, modules),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def remembered(key: str, candidates: int) -> int | None:
    """The candidate chosen before, or None where there is no such record or it cannot be trusted."""
    try:
        chosen = json.loads(_path(key).read_text())["chosen"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return chosen if isinstance(chosen, int) and 0 <= chosen < candidates else None


def remember(key: str, chosen: int, seconds: Sequence[float]) -> bool:
    """Record a choice and what was measured. False when the cache folder cannot be written; the choice still stands."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"chosen": chosen, "seconds": list(seconds)}, file)
            Path(draft).replace(path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
    except OSError:
        return False
    return True


def _path(key: str) -> Path:
    return cache_dir() / "choices" / f"{key[:40]}.json"


def measure(executors: Sequence[Executor], spec: EngineSpec) -> list[float]:
    """Seconds that each prefill executor takes for a piece of prompt: the best of a few runs, taken in turns.

    A candidate that is clearly behind after the first turn is not run again; its one time stands. The weights of a
    model do not stay in cache from one run to the next, so these are the times of real prompts.
    """
    tokens = min(spec.chunk, spec.max_length, _TOKENS)
    dims = {"B": 1, "S": tokens, "T": tokens, "L": 1}
    state = RequestState(spec, 1, max(1, _rows(spec)))
    ids = torch.arange(tokens, device=spec.device).remainder(max(spec.vocab_size, 1)).unsqueeze(0)
    positions = torch.arange(tokens, device=spec.device).unsqueeze(0)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": state.mask}
    outputs = {o.name: o.empty(dims, spec.device) for o in spec.outputs}
    best = [float("inf")] * len(executors)
    for _ in range(_RUNS):
        for n, executor in enumerate(executors):
            if best[n] != float("inf") and best[n] > _BEHIND * min(best):
                continue
            _wait(spec.device)
            start = time.perf_counter()
            executor.run(inputs, dims, state, outputs)
            _wait(spec.device)
            best[n] = min(best[n], time.perf_counter() - start)
    return best


def _rows(spec: EngineSpec) -> int:
    return next((high for name, _, high in spec.symbols if name == "B"), 1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
