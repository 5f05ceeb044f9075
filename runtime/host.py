"""Small work on the host between two steps, where every microsecond counts.

After a decode step of some milliseconds all caches are full of weights, so that a call of PyTorch costs 20 to 60
microseconds, one of NumPy a tenth of that. And PyTorch divides even a copy of one row of logits, which a single thread
does in some microseconds; its other threads then go on spinning for several milliseconds, on the processors that the
next steps' kernels need. (Measured on two cores: the next three steps took twice as long.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def quick(tensor: Tensor) -> Any:
    """On a CPU, the tensor as an array over the same memory; elsewhere the tensor itself. Not for bfloat16."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def write(to: Any, values: Sequence[int]) -> None:
    """Fill what :func:`quick` gave of a vector with numbers."""
    to[:] = torch.tensor(values) if isinstance(to, Tensor) else values


def copy(to: Tensor, source: Tensor) -> None:
    """Copy a contiguous tensor into another one of its shape and dtype, on this thread alone."""
    if to.device.type == "cpu":
        np.copyto(_bytes(to), _bytes(source))
    else:
        to.copy_(source)


def clone(source: Tensor) -> Tensor:
    """A copy of a contiguous tensor, made on this thread alone."""
    twin = torch.empty_like(source)
    copy(twin, source)
    return twin


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at an address divisible by 16, as kernels are compiled for; a copy where it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def stream_number(device: torch.device) -> int:
    """Which of a GPU's streams the caller is on; 0 elsewhere."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).numpy()


@contextmanager
def one_torch_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, run PyTorch's ops in this block on this thread alone.

    PyTorch counts threads by thread, so other threads go on with theirs; but one that calls PyTorch for the first time
    meanwhile starts with one. Hence this is for what NumPy cannot do, which is sampling.
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
