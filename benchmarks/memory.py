"""Memory that running a model allocates, as PyTorch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tilewright.cache import cache_of


def allocation_events(run: Callable[[], Any]) -> list[int]:
    """Bytes of each allocation (positive) and release (negative) through PyTorch's CPU allocator, in order of time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    del result  # kept until here: what the caller would hold counts as live
    events = recorded.profiler.kineto_results.events()
    found = [(e.start_ns(), n, e.nbytes()) for n, e in enumerate(events) if e.name() == "[memory]"]
    return [size for _, _, size in sorted(found)]


def peak(events: list[int]) -> int:
    """The most bytes that were live at once, above what was live before."""
    live = highest = 0
    for size in events:
        live += size
        highest = max(highest, live)
    return highest


@torch.no_grad()
def eager_peak(model: Any, ids: Tensor) -> int:
    """Peak bytes of activations while ``model`` runs a prompt i64[1, S] and keeps the last token's logits.

    Without a cache, because KV state is not activations; weights are allocated before and do not count.
    """
    return peak(allocation_events(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)))


@torch.no_grad()
def our_peak(fast: Any, ids: Tensor) -> int:
    """The same of a compiled model: peak bytes of the first call of a request, its KV state not counted."""
    caches = []
    fast._tilewright.engine.idle.make_room()  # a request that takes over memory would seem to need none
    events = allocation_events(lambda: caches.append(cache_of(fast(input_ids=ids, logits_to_keep=1))))
    return peak(events) - sum(cache.state.nbytes for cache in caches)


@torch.no_grad()
def allocations_per_step(fast: Any, ids: Tensor, steps: int = 4) -> int:
    """Tensors that one decode step of a compiled model allocates, after a prompt i64[1, S].

    Counts the step itself (the kernels and what calls them), the most of ``steps`` steps.
    """
    cache = cache_of(fast(input_ids=ids, logits_to_keep=1))
    engine, state = cache.engine, cache.state
    state.ids.copy_(ids[:, -1:])
    state.positions.fill_(ids.shape[1])
    engine.advance(state)  # what a request sets up once is not part of a step
    return max(
        sum(size > 0 for size in allocation_events(lambda: engine.advance(state))) for _ in range(steps)
    )
