"""How fast this machine reads memory right now: the bound that a decode step is held against.

Shared machines wander by a factor of two within minutes, so the probe runs beside every pair of samples.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tilewright.settings import cxx

SOURCE = Path(__file__).parent / "read_bandwidth.cpp"
DEFAULT_BYTES = 512 << 20  # far beyond any cache


class BandwidthProbe:
    """Reads a large buffer with ``threads`` threads and times it."""

    def __init__(self, library: Path, threads: int, nbytes: int = DEFAULT_BYTES) -> None:
        self._read = ctypes.CDLL(str(library)).read_all
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._read.restype = ctypes.c_uint64
        self.threads = threads
        # ones, because pages that were never written all map to one page of zeros, which stays in cache
        grain = threads * 128  # whole pieces for every thread
        self._buffer = torch.ones(nbytes // 8 // grain * grain, dtype=torch.int64)

    def __call__(self, rounds: int = 3, now: Callable[[], float] = time.perf_counter) -> float:
        """Bytes per second of ``rounds`` readings, by the clock ``now``. Raises RuntimeError when the sum is wrong."""
        count = self._buffer.numel()
        start = now()
        sums = [self._read(self._buffer.data_ptr(), count, self.threads) for _ in range(rounds)]
        seconds = now() - start
        if sums != [count] * rounds:
            raise RuntimeError(f"the bandwidth probe read {sums} instead of {count}")
        return rounds * self._buffer.nbytes / seconds


@contextmanager
def bandwidth_probe(threads: int, nbytes: int = DEFAULT_BYTES) -> Iterator[BandwidthProbe]:
    """A probe built for this machine. Raises CalledProcessError or OSError when the C++ compiler fails."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read_bandwidth.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([cxx() or "g++", *flags, str(SOURCE), "-o", str(library)], check=True)
        yield BandwidthProbe(library, threads, nbytes)


@contextmanager
def device_probe(device: torch.device) -> Iterator[Callable[[], float]]:
    """A function that gives the bytes per second at which ``device`` reads memory right now: on a GPU by summing a
    buffer of a gibibyte, which PyTorch does at the speed of the memory; elsewhere as :func:`bandwidth_probe`."""
    if device.type != "cuda":
        with bandwidth_probe(torch.get_num_threads()) as probe:
            yield probe
        return
    buffer = torch.ones(1 << 28, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def read() -> float:
        buffer.sum()
        begin.record()
        for _ in range(4):
            buffer.sum()
        end.record()
        torch.cuda.synchronize(device)
        return 4 * buffer.nbytes / (begin.elapsed_time(end) / 1e3)

    yield read
