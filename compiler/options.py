"""The options of ``compile``, checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilewright.errors import DeviceError, OptionError
from tilewright.ir.attention import STORED_AS
from tilewright.ir.types import DType
from tilewright.passes.weight_forms import FORMS
from tilewright.runtime.device import require_device

from .capture_inputs import most_positions

BACKENDS = ("triton", "cpp", "reference")
WEIGHTS = tuple(FORMS)
KV_CACHE = {"bf16": DType.bf16, "fp8": DType.f8}
AUTOTUNE = ("off", "cached", "full")
DEFAULT_MAX_LENGTH = 2048
CHUNK, LEAST_CHUNK = {"triton": 2048, "cpp": 512, "reference": 512}, 512
"""Longest piece of a prompt that one prefill runs, by backend, and what it is for the largest batches; multiples of
every tile size. A GPU reads the weights once more for each piece, and is not filled by a short one."""
MOST_SPECULATIVE = 7
"""Tokens that one step can check beside its own: up to eight rows share each read of a weight at little cost."""
MOST_TOKENS = 1 << 15
"""Tokens of a whole batch in one run, for which the arena has room, above which pieces get shorter."""


@dataclass(frozen=True)
class Options:
    """Options with every default filled in. ``max_length`` is 0 for a module that has no sequences; ``weights`` and
    ``kv_cache`` are "" for the model's own dtype; otherwise ``kv_cache`` is an element type of the IR."""

    batch_sizes: tuple[int, ...]
    max_length: int
    weights: str
    kv_cache: str
    autotune: str
    backend: str
    device: torch.device
    dump: Path | None
    speculative_tokens: int = 0

    @property
    def max_batch(self) -> int:
        return max(self.batch_sizes)

    def of_part(self, name: str) -> Options:
        """The options for a part of the model that is compiled by itself and keeps no KV state. Raises OptionError
        where its dump cannot be written."""
        dump = None if self.dump is None else _dump_folder(self.dump / name)
        return replace(self, kv_cache="", dump=dump, speculative_tokens=0)

    @property
    def chunk(self) -> int:
        """Tokens of a sequence per prefill run."""
        fitting = max(LEAST_CHUNK, 1 << (MOST_TOKENS // self.max_batch).bit_length() - 1)
        return min(CHUNK[self.backend], fitting, self.max_length)


def check_options(
    model: nn.Module,
    batch_sizes: Sequence[int],
    max_length: int | None,
    weights: str | None,
    kv_cache: str | None,
    autotune: str,
    backend: str | None,
    dump: str | os.PathLike[str] | None,
    speculative_tokens: int = 0,
) -> Options:
    """Raise OptionError or DeviceError, naming the remedy, for options that cannot work with ``model``."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"compile takes an nn.Module, got {type(model).__name__}")
    _check_autotune(autotune)
    device = _device(model)
    longest = _max_length(model, max_length)
    return Options(
        batch_sizes=_batch_sizes(batch_sizes),
        max_length=longest,
        weights=weights_form(weights),
        kv_cache=_kv_cache(model, kv_cache),
        autotune=autotune,
        backend=_backend(backend, device),
        device=device,
        dump=_dump_folder(dump),
        speculative_tokens=_speculative_tokens(speculative_tokens, longest),
    )


@dataclass(frozen=True)
class GraphOptions:
    """The options of ``torch.compile(backend="tilewright")``, before the device is known. kernels: a backend of
    ``compile``, or None for the device's own."""

    kernels: str | None = None
    autotune: str = "cached"
    dump: str | os.PathLike[str] | None = None

    @staticmethod
    def of(given: Mapping[str, Any], mode: str | None) -> GraphOptions:
        """Raise OptionError for an option that there is not, and for values that cannot work."""
        if mode is not None:
            raise OptionError(
                f"mode={mode!r} means nothing here; pass options={{'autotune': 'full'}} to tune kernels"
            )
        known = tuple(field.name for field in fields(GraphOptions))
        if unknown := sorted(set(given) - set(known)):
            raise OptionError(f"unknown options {', '.join(unknown)}; this backend has {', '.join(known)}")
        options = GraphOptions(**given)
        if options.kernels is not None and options.kernels not in BACKENDS:
            raise OptionError(f"kernels={options.kernels!r} is none of {', '.join(BACKENDS)}")
        _check_autotune(options.autotune)
        return options

    def on(self, device: torch.device, name: str) -> Options:
        """The options for a graph on ``device``, whose dump goes to the folder ``name``. Raises OptionError,
        DeviceError."""
        return Options(
            batch_sizes=(1,),
            max_length=1,
            weights="",
            kv_cache="",
            autotune=self.autotune,
            backend=_backend(self.kernels, device),
            device=device,
            dump=None if self.dump is None else _dump_folder(Path(self.dump) / name),
        )


def _check_autotune(autotune: str) -> None:
    if autotune not in AUTOTUNE:
        raise OptionError(f"autotune={autotune!r} is none of {', '.join(AUTOTUNE)}")


def _batch_sizes(sizes: Any) -> tuple[int, ...]:
    if isinstance(sizes, int) and not isinstance(sizes, bool):
        sizes = (sizes,)
    sizes = tuple(sizes) if isinstance(sizes, list | tuple | range | set) else ()
    if not sizes or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes):
        raise OptionError("batch_sizes must be positive integers, for example batch_sizes=(1, 4)")
    return tuple(sorted(set(sizes)))


def _speculative_tokens(wanted: Any, longest: int) -> int:
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 0 <= wanted <= MOST_SPECULATIVE:
        raise OptionError(f"speculative_tokens must be a number from 0 to {MOST_SPECULATIVE}, got {wanted!r}")
    if wanted >= longest:
        raise OptionError(f"speculative_tokens={wanted} is no less than max_length={longest}; make it less")
    return wanted


def weights_form(wanted: str | None) -> str:
    """``weights`` as the passes take it: "" for None. Raises OptionError for an unknown form."""
    return _form("weights", wanted, WEIGHTS)


def cache_form(wanted: str | None) -> str:
    """``kv_cache`` as the passes take it: an element type, or "" for None. Raises OptionError for an unknown form."""
    form = _form("kv_cache", wanted, tuple(KV_CACHE))
    return KV_CACHE[form].value if form else ""


def _form(option: str, wanted: str | None, known: tuple[str, ...]) -> str:
    if wanted is not None and wanted not in known:
        raise OptionError(
            f"{option}={wanted!r} is none of {', '.join(known)}; leave {option} out to keep the model's own dtype"
        )
    return wanted or ""


def _kv_cache(model: nn.Module, wanted: str | None) -> str:
    form = cache_form(wanted)
    if not form:
        return ""
    dtype = DType(form)
    own = {DType.from_torch(p.dtype) for p in model.parameters() if p.is_floating_point()}
    if any(dtype is not d and dtype not in STORED_AS.get(d, ()) for d in own):
        names = ", ".join(sorted(d.value for d in own))
        raise OptionError(
            f"kv_cache={wanted!r} does not go with a model in {names}; convert it with model.to(torch.bfloat16) or "
            "model.to(torch.float32), or leave kv_cache out"
        )
    return "" if own == {dtype} else dtype.value


def _max_length(model: nn.Module, wanted: int | None) -> int:
    limit = most_positions(model)
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
    device = devices.pop()
    if device.type == "meta":
        raise DeviceError(
            "the model is on meta, where tensors have no values; load its weights before compiling"
        )
    return device


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
