"""Launches recorded once and replayed: a decode step costs the host one call instead of one per kernel.

A graph holds addresses and launch arguments as they were. The kernels of a decode step read the context from memory
(``STORED_DIMS``), and its tensors stay where they are for a request and for later ones in the same state, so that one
graph serves all their steps.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

alone = threading.Lock()
"""Held while something is recorded: meanwhile nobody else may draw from the default generator, which threads share."""
_failed: list[torch.cuda.CUDAGraph] = []  # the allocator may still point to a graph whose recording broke off


Recorder = Callable[[Callable[[], None], torch.device], Callable[[], None] | None]
"""Takes launches on a device, runs none of them, and gives a function that replays them, or None."""


def record(
    launches: Callable[[], None],
    device: torch.device,
    otherwise: str = "decode steps are launched kernel by kernel",
) -> Callable[[], None] | None:
    """A function that replays ``launches``; None where they cannot be recorded, with a warning that says ``otherwise``.

    Recording runs nothing. Whatever ``launches`` needs (compiled kernels, loaded modules) must be ready, so run it once
    before. What it allocates must be free again at its end, and makes replays belong to the caller's stream. Numbers
    that it draws from the default generator are drawn anew by each replay, which moves the generator on as the launches
    would.
    """
    from triton.errors import TritonError

    try:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        with alone:
            place = _places.get(current) or _Place(device)
            _places[current] = place
            place.stream.wait_stream(current)
            with _captured(graph, place.stream, place.keeper.pool()):
                launches()
    except (RuntimeError, TritonError) as error:
        _places.clear()  # a pool may have been left in the middle of something
        _release_generator(device)
        warnings.warn(f"{otherwise}: no CUDA graph, {error}", stacklevel=2)
        return None
    current.wait_stream(place.stream)
    return partial(_replay, graph)


class _Place:
    """Where recordings that one stream replays are made: on a stream, and in memory, that they share.

    Replays on one stream come one after the other, and none needs what another one has allocated. With a pool to each
    recording a process would fill its GPU with pools of recordings that are gone, as PyTorch's allocator frees them
    only when nothing else is left.
    """

    def __init__(self, device: torch.device) -> None:
        # The allocator uses a block again only on the stream it was made for; a pool ends with its last graph.
        self.stream, self.keeper = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        with _captured(self.keeper, self.stream):
            torch.zeros(1, device=device)


_places: dict[torch.cuda.Stream, _Place] = {}
"""By the stream that replays."""


def recorded_bytes() -> int:
    """Device memory in the pools of all recordings made here; 0 where there are none."""
    pools = {place.keeper.pool() for place in _places.values()}
    segments = torch.cuda.memory_snapshot() if pools else []
    return sum(int(s["total_size"]) for s in segments if tuple(s["segment_pool_id"]) in pools)


@contextmanager
def _captured(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: torch.cuda._POOL_HANDLE | None = None
) -> Iterator[None]:
    """Record what the block launches on ``stream`` as ``graph``. No garbage is collected meanwhile: what is freed may
    call CUDA, to unload a kernel for example, and so break the recording off."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode(False), torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
    except BaseException:
        _failed.append(graph)
        raise
    finally:
        if collects:
            gc.enable()


def is_recording() -> bool:
    """True while the caller's stream is recorded."""
    # Builds of PyTorch without CUDA cannot be asked.
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _replay(graph: torch.cuda.CUDAGraph) -> None:
    with alone:
        graph.replay()


def _release_generator(device: torch.device) -> None:
    """Give the default generator its state in a new object: a recording that broke off may have left the old one in
    waiting for the end. Recordings that draw and are in use now go on with the old one."""
    index = device.index or 0
    for generator in torch.cuda.default_generators[index : index + 1]:
        generator.graphsafe_set_state(generator.clone_state())
