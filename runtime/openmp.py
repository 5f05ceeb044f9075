"""The OpenMP library of PyTorch, on whose threads C++ kernels run where the two take turns.

Its threads go on spinning for some 10 ms after each of PyTorch's operations, and would take the cores from threads of
our own. It is looked up in the process and never loaded: a second OpenMP library would bring a second set of threads.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch


class OpenMP(ctypes.Structure):
    """The addresses of what a team needs of an OpenMP library: ``tw::OpenMP`` in ``parallel.h``."""

    _fields_ = (
        ("parallel", ctypes.c_void_p),
        ("thread_number", ctypes.c_void_p),
        ("thread_count", ctypes.c_void_p),
    )


_NAMES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def find() -> OpenMP | None:
    """PyTorch's OpenMP library; None where PyTorch does without, or where it does not have GCC's entry points.

    Also None where its threads were told to sleep between operations (``OMP_WAIT_POLICY``): these are in nobody's way,
    and waking them takes 50 microseconds each time.
    """
    if sys.platform == "win32" or not torch.backends.openmp.is_available() or _sleeping():
        return None
    # The scope that PyTorch's own references were resolved in: it loads its dependencies for all to see.
    everything = ctypes.CDLL(None)
    try:
        return OpenMP(*(ctypes.cast(getattr(everything, name), ctypes.c_void_p) for name in _NAMES))
    except AttributeError:
        return None


def _sleeping() -> bool:
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"


_found = find()
_address = None if _found is None else ctypes.addressof(_found)


def torch_openmp() -> int | None:
    """The address of an :class:`OpenMP` for a library's functions; None for the library's own threads."""
    return _address


def _forget() -> None:
    global _address
    _address = None


# The child of a fork has none of its parent's threads. libgomp waits for them for ever; our own threads start anew.
if _address is not None:
    os.register_at_fork(after_in_child=_forget)
