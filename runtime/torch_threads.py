"""Keeping PyTorch's threads away from the processors that our kernels need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_torch_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, run PyTorch's ops in this block on this thread alone.

    For what stands between two decode steps: PyTorch divides even a copy of one row of logits, which a single thread
    does in some microseconds, and its other threads then go on spinning for several milliseconds, on the processors
    that the next steps' kernels need. (Measured on two cores: the next three steps took twice as long.)
    """
    if device.type != "cpu":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
