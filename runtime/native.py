"""Shared libraries of generated kernels: loading them and calling their two functions through ctypes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewright.ir.program import KernelBuildError

PointerTable = ctypes.Array[ctypes.c_void_p]
"""The address of every buffer of a program, in the order of ``Program.buffers``."""


def pointer_table(addresses: Sequence[int]) -> PointerTable:
    """A table that :meth:`NativeLibrary.run` takes; its entries may be set again before each run."""
    return (ctypes.c_void_p * max(len(addresses), 1))(*addresses)


@dataclass(frozen=True)
class Tuning:
    """What a run may choose: how many threads (0: as many as PyTorch has), and how many bytes ahead of their use
    weights are requested from memory."""

    threads: int = 0
    prefetch_bytes: int = 8192


class NativeLibrary:
    """One program's kernels. Calls release the interpreter lock; the library itself holds no state.

    path: a shared library that this process may trust (``codegen.cpp.build`` checks what it finds on disk).
    symbols: names of the program's dims, in the order of ``Program.symbols``. Raises KernelBuildError when the file
    cannot be loaded.
    """

    def __init__(self, path: Path, symbols: Sequence[str]) -> None:
        self.path = path
        self.symbols = tuple(symbols)
        try:
            library = ctypes.CDLL(os.fspath(path))
            self._workspace, self._run = library.tw_workspace, library.tw_run
        except (OSError, AttributeError) as error:
            raise KernelBuildError(f"the compiled kernels in {path} cannot be loaded: {error}") from error
        self._dims_type = ctypes.c_long * max(len(self.symbols), 1)
        dims = ctypes.POINTER(ctypes.c_long)
        self._workspace.argtypes, self._workspace.restype = (dims, ctypes.c_int), ctypes.c_long
        self._run.argtypes = (
            ctypes.POINTER(ctypes.c_void_p), dims, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_long,
            ctypes.c_long, ctypes.c_long,
        )  # fmt: skip
        self._run.restype = None

    def dims(self, sizes: Sequence[int]) -> ctypes.Array[ctypes.c_long]:
        """Sizes of the symbols, in their order, as :meth:`run` takes them."""
        return self._dims_type(*sizes)

    def workspace_bytes(self, dims: ctypes.Array[ctypes.c_long], threads: int) -> int:
        """Bytes of scratch memory, aligned to 64, that a run at these dims needs; it grows with each of them."""
        return int(self._workspace(dims, threads))

    def run(
        self,
        buffers: PointerTable,
        dims: ctypes.Array[ctypes.c_long],
        workspace: int,
        threads: int,
        prefetch_bytes: int = Tuning.prefetch_bytes,
        first: int = 0,
        last: int = 2**31,
        openmp: int | None = None,
    ) -> None:
        """Run the steps ``first <= n < last`` of the program, counted in execution order over all calls.

        workspace: address of scratch memory that no concurrent run uses. openmp: whose threads do the work
        (``openmp.torch_openmp``), or None for the library's own.
        """
        self._run(buffers, dims, workspace, openmp, threads, prefetch_bytes, first, last)
