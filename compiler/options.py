"""The options of ``compile``, checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright.errors import DeviceError, OptionError
from tilewright.passes.quantize_weights import BITS
from tilewright.runtime.device import require_device

BACKENDS = ("triton", "cpp", "reference")
WEIGHTS = tuple(BITS)
AUTOTUNE = ("off", "cached", "full")
DEFAULT_MAX_LENGTH = 2048
CHUNK = 512
"""Longest piece of a prompt that one prefill runs; a multiple of every tile size."""


@dataclass(frozen=True)
class Options:
    """Options with every default filled in. ``max_length`` is 0 for a module that has no sequences; ``weights`` is ""
    for the model's own dtype."""

    batch_sizes: tuple[int, ...]
    max_length: int
    weights: str
    autotune: str
    backend: str
    device: torch.device
    dump: Path | None

    @property
    def max_batch(self) -> int:
        return max(self.batch_sizes)

    @property
    def chunk(self) -> int:
        """Tokens per prefill run."""
        return min(CHUNK, self.max_length)


def check_options(
    model: nn.Module,
    batch_sizes: Sequence[int],
    max_length: int | None,
    weights: str | None,
    autotune: str,
    backend: str | None,
    dump: str | os.PathLike[str] | None,
) -> Options:
    """Raise OptionError or DeviceError, naming the remedy, for options that cannot work with ``model``."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"compile takes an nn.Module, got {type(model).__name__}")
    if weights is not None and weights not in WEIGHTS:
        raise OptionError(
            f"weights={weights!r} is none of {', '.join(WEIGHTS)}; leave weights out to keep the model's own dtype"
        )
    if autotune not in AUTOTUNE:
        raise OptionError(f"autotune={autotune!r} is none of {', '.join(AUTOTUNE)}")
    device = _device(model)
    return Options(
        batch_sizes=_batch_sizes(batch_sizes),
        max_length=_max_length(model, max_length),
        weights=weights or "",
        autotune=autotune,
        backend=_backend(backend, device),
        device=device,
        dump=_dump_folder(dump),
    )


def _batch_sizes(sizes: Any) -> tuple[int, ...]:
    if isinstance(sizes, int) and not isinstance(sizes, bool):
        sizes = (sizes,)
    sizes = tuple(sizes) if isinstance(sizes, list | tuple | range | set) else ()
    if not sizes or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
        raise OptionError("batch_sizes must be positive integers, for example batch_sizes=(1, 4)")
    return tuple(sorted(set(sizes)))


def _max_length(model: nn.Module, wanted: int | None) -> int:
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return min(DEFAULT_MAX_LENGTH, limit) if limit else DEFAULT_MAX_LENGTH
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise OptionError(f"max_length must be a positive integer, got {wanted!r}")
    if limit and wanted > limit:
        raise OptionError(
            f"max_length={wanted} is more than the {limit} positions that this model has "
            f"(config.max_position_embeddings); pass max_length={limit} or less"
        )
    return wanted


def _device(model: nn.Module) -> torch.device:
    devices = {t.device for t in (*model.parameters(), *model.buffers())} or {torch.device("cpu")}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise DeviceError(f"the model is spread over {names}; move it to one device with model.to(...)")
    return devices.pop()


def _backend(wanted: str | None, device: torch.device) -> str:
    if wanted is None:
        wanted = {"cpu": "cpp", "cuda": "triton"}.get(device.type, "reference")
    if wanted not in BACKENDS:
        raise OptionError(f"backend={wanted!r} is none of {', '.join(BACKENDS)}")
    if wanted == "cpp" and device.type != "cpu":
        raise DeviceError(f"backend='cpp' runs on the CPU, but the model is on {device}; use model.to('cpu')")
    if wanted == "triton":
        require_device(device)
    return wanted


def _dump_folder(dump: str | os.PathLike[str] | None) -> Path | None:
    if dump is None:
        return None
    folder = Path(dump).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"dump={str(dump)!r} cannot be made a folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise OptionError(f"dump={str(dump)!r} is not writable; pass another folder")
    return folder
