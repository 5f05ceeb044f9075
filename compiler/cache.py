"""The Hugging Face cache object of a compiled model: a handle to one request's state in our runtime."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tilewright.ir.errors import InputError
from tilewright.runtime.engine import Engine
from tilewright.runtime.kv_state import RequestState

# From Transformers 5.24 on a cache is called the same everywhere. Until then it was cache_params for models that are
# recurrent alone. Old names live on there, but each use of one warns, so that nothing of ours may use them.
_NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(takes: Callable[..., Any]) -> str | None:
    """The argument by which a function (a model's forward, or the class of what it returns) takes a cache.

    None where it takes none.
    """
    known = inspect.signature(takes).parameters
    return next((name for name in _NAMES if name in known), None)


def with_cache(takes: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """``cache`` as a keyword argument of ``takes``; nothing where that takes none."""
    name = cache_name(takes)
    return {} if name is None else {name: cache}


def cache_of(output: Any) -> Any:
    """The cache in what a model's forward or ``generate`` returned; None where there is none."""
    name = cache_name(type(output))
    return None if name is None else output.get(name)


def by_own_name(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``arguments`` with the cache under the ``name`` that the model has for it.

    Another release's name is taken too, with a warning, as it is in Transformers: ignored, it would lose the context.
    """
    given = dict(arguments)
    for other in [n for n in _NAMES if n in given and n != name]:
        warnings.warn(
            f"{other} is what another release of Transformers calls it: pass the cache as {name}=",
            FutureWarning,
            stacklevel=3,
        )
        given.setdefault(name, given.pop(other))
    return given


class _Lease:
    """Holds a request's state for all caches that share it, and gives it back to the engine with the last of them."""

    def __init__(self, engine: Engine, state: RequestState) -> None:
        self.state = state
        weakref.finalize(self, engine.give_back, state).atexit = False


class EngineCache(Cache):
    """What ``generate`` and callers hold as a model's cache; it has no layers, since the kernels own the KV state.

    The state is made at the first forward, when the batch size is known.
    """

    is_compileable = False  # otherwise generate() would build 4-D masks and torch.compile our forward
    is_initialized = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(layers=[])
        self.engine = engine
        self._lease: _Lease | None = None

    def __repr__(self) -> str:
        return f"EngineCache(batch={self.batch_size}, length={self.get_seq_length()})"

    def __bool__(self) -> bool:
        """True, where the base counts layers: models ask so whether there is a cache."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineCache:
        """A cache of the same model with a copy of the request, as for continuing one prefix in several ways."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.layers = []
        twin._lease = None if self.state is None else _Lease(self.engine, copy.deepcopy(self.state, memo))
        return twin

    @property
    def state(self) -> RequestState | None:
        """The request's state, None before the first forward."""
        return None if self._lease is None else self._lease.state

    def state_for(self, batch: int) -> RequestState:
        """The request's state, made now for ``batch`` sequences when there is none."""
        if self._lease is None:
            self._lease = _Lease(self.engine, self.engine.new_state(batch))
        return self._lease.state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions held."""
        return 0 if self.state is None else self.state.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that a mask is built for, and the first of them: all that there will be, whatever a layer's window."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Capacity in positions."""
        return self.engine.spec.max_length

    @property
    def is_linear(self) -> list[bool]:
        """Whether what a layer keeps is recurrent, for each such state.

        generate() asks whether all are, and of none, as the base has no layers to tell of, that would be so.
        """
        spec = self.engine.spec
        return [False] * len(spec.slots) + [True] * len(spec.recurrent)

    @property
    def is_croppable(self) -> bool:
        """Whether the last positions can be removed."""
        return not self.engine.spec.recurrent

    @property
    def batch_size(self) -> int:
        """Number of sequences, or -1 before the first forward."""
        return -1 if self.state is None else self.state.batch

    def reset(self) -> None:
        """Forget the request."""
        self._lease = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` positions; a positive number is the length to keep, as it once was."""
        if self.state is not None and tokens_to_remove != 0:
            keep = tokens_to_remove if tokens_to_remove > 0 else self.state.length + tokens_to_remove
            self.state.crop(keep)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues row ``beam_idx[i]``."""
        if self.state is not None:
            self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        if self.state is not None:
            self._select(torch.arange(self.state.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` only, in that order."""
        if self.state is not None:
            self._select(torch.arange(self.state.batch)[indices.cpu()])

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state.select(rows, self.engine.bucket(rows.numel()))

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The cache of a compiled model cannot serve another model. Always raises InputError."""
        raise InputError(
            "this cache belongs to a compiled model, whose kernels write it; use a DynamicCache elsewhere"
        )
