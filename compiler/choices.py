"""What was chosen by measurement, remembered on disk under all that the choice depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from tilewright import codegen
from tilewright.codegen.cpp.build import processor
from tilewright.runtime.files import write_atomically

from .settings import cache_dir
from .sources import digest_of, files_of


def choice_key(texts: Sequence[object], backend: str, device: torch.device) -> str:
    """Names everything that a choice depends on: the candidates' IR (or whatever else tells them apart, as text), how
    kernels are printed, device, threads and library versions."""
    parts = (
        backend,
        torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        str(os.cpu_count()),
        str(torch.get_num_threads()),
        torch.__version__,
        _printers(),
        *map(str, texts),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def _printers() -> str:
    """A hash of the code that prints kernels."""
    return digest_of(files_of(map(Path, codegen.__path__)))


def remembered(key: str, candidates: int, measured: bool = False) -> int | None:
    """The candidate chosen before, or None where there is no such record or it cannot be trusted.

    measured: only a choice that was measured; another one stands because its rivals did not run.
    """
    try:
        record = json.loads(_path(key).read_text())
        chosen = record["chosen"]
        if measured and not record["seconds"]:
            return None
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
