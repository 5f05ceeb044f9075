"""Launches recorded once and replayed: a decode step costs the host one call instead of one per kernel.

A graph holds addresses and launch arguments as they were. The kernels of a decode step read the context from memory
(``STORED_DIMS``), and its tensors stay where they are for a request, so one graph serves all steps of that request.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch

_one_at_a_time = threading.Lock()
_failed: list[torch.cuda.CUDAGraph] = []  # the allocator may still point to a graph whose recording broke off


def record(launches: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """A function that replays ``launches``; None, with a warning, where they cannot be recorded.

    Recording runs nothing. Whatever ``launches`` needs (compiled kernels, loaded modules) must be ready, so run it once
    before. It must not allocate.
    """
    from triton.errors import TritonError

    graph: torch.cuda.CUDAGraph | None = None
    try:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with _one_at_a_time, torch.inference_mode(False), torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                launches()
            finally:
                graph.capture_end()
    except (RuntimeError, TritonError) as error:
        if graph is not None:
            _failed.append(graph)
        warnings.warn(f"decode steps are launched kernel by kernel: no CUDA graph, {error}", stacklevel=2)
        return None
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay
