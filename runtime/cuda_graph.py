"""Launches recorded once and replayed: a decode step costs the host one call instead of one per kernel.

A graph holds addresses and launch arguments as they were. The kernels of a decode step read the context from memory
(``STORED_DIMS``), and its tensors stay where they are for a request, so one graph serves all steps of that request.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
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
    before. What it allocates belongs to the recording. Numbers that it draws from the default generator are drawn anew
    by each replay, which moves the generator on as the launches would.
    """
    from triton.errors import TritonError

    graph: torch.cuda.CUDAGraph | None = None
    try:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with alone, torch.inference_mode(False), torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                launches()
            finally:
                graph.capture_end()
    except (RuntimeError, TritonError) as error:
        if graph is not None:
            _failed.append(graph)
        _release_generator(device)
        warnings.warn(f"{otherwise}: no CUDA graph, {error}", stacklevel=2)
        return None
    torch.cuda.current_stream(device).wait_stream(stream)
    return partial(_replay, graph)


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
