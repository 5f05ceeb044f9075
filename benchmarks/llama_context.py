"""llama.cpp through ``llama-cpp-python``'s low-level functions: one model, one sequence, tokens in and logits out."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.system import LeftOut

INSTALL = 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python'
"""Without the option, pip builds it for any processor with AVX2: pip's builds are meant to be repeatable elsewhere."""

WITHOUT_AMX = " ".join(
    f"-DCMAKE_{language}_FLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'" for language in ("C", "CXX")
)

EXTENSIONS = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "AVX512_BF16", "avx512_vnni": "AVX512_VNNI"}
"""Vector extensions as ``machine.describe`` and as llama.cpp call them."""


@cache
def library() -> Any:
    """The module ``llama_cpp``, which is an extra. Raises LeftOut where it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise LeftOut(f"llama-cpp-python is not installed; run: {INSTALL}")
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(
        logging.ERROR
    )  # else it reports every tensor that it loads
    llama_cpp.llama_backend_init()
    return llama_cpp


def system_info() -> str:
    """The vector extensions and options that llama.cpp was built with, in its own words."""
    return str(library().llama_print_system_info().decode()).strip()


def unused_extensions(info: str, machine: Sequence[str]) -> list[str]:
    """Extensions of the machine that llama.cpp, by its ``system_info``, was built without."""
    return [name for name in machine if name in EXTENSIONS and f"{EXTENSIONS[name]} = 1" not in info]


def require_survivor(file: Path, threads: int) -> None:
    """Try a prompt and a token in a process of its own: an instruction that a machine refuses ends the process, and all
    that was measured goes with it. Raises LeftOut that names the signal."""
    lines = (
        "from pathlib import Path",
        "from benchmarks.llama_context import LlamaContext",
        f"context = LlamaContext(Path({str(file)!r}), {threads}, 128)",
        "context.evaluate(range(100, 164))",
        "context.evaluate([1])",
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=root, capture_output=True, check=False
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise LeftOut(
            f"llama.cpp dies of {name} with {file.name}; with AMX, build it without: "
            f'CMAKE_ARGS="-DGGML_NATIVE=ON {WITHOUT_AMX}" pip install --no-cache-dir --force-reinstall llama-cpp-python'
        )


class LlamaContext:
    """A model file and the KV state of one sequence with ``room`` positions.

    Everything that is not named here is llama.cpp's default, among it flash attention where it thinks fit, and keys
    and values in f16.
    """

    def __init__(self, file: Path, threads: int, room: int) -> None:
        self._lib = lib = library()
        self._model = lib.llama_model_load_from_file(bytes(file), lib.llama_model_default_params())
        if not self._model:
            raise LeftOut(f"llama.cpp cannot load {file.name}")
        options = lib.llama_context_default_params()
        options.n_ctx = options.n_batch = (
            room  # a prompt is one batch; its pieces (n_ubatch) are as by default
        )
        options.n_threads = options.n_threads_batch = threads
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            raise LeftOut(f"llama.cpp cannot make a context of {room} positions")
        self.vocabulary = int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model)))
        self.length = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors in the file. The table is the output matrix too, so a step reads each of them."""
        return int(self._lib.llama_model_size(self._model))

    def evaluate(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append ``tokens``; the logits of the last one, f32[V], valid until the next call."""
        ids = (self._lib.llama_token * len(tokens))(*tokens)
        self._decode(self._lib.llama_batch_get_one(ids, len(tokens)), len(tokens))
        return self._logits(-1)

    def evaluate_all(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append ``tokens``; a copy of the logits of each of them, f32[n, V]."""
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for n, token in enumerate(tokens):
                batch.token[n], batch.pos[n] = token, self.length + n
                batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = 1, 0, 1
            self._decode(batch, len(tokens))
        finally:
            self._lib.llama_batch_free(batch)
        return np.stack([self._logits(n) for n in range(len(tokens))])

    def forget(self, length: int) -> None:
        """Keep the first ``length`` positions only."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), 0, length, -1)
        self.length = length

    def close(self) -> None:
        """Free the model and its context; neither may be used afterwards."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def _decode(self, batch: Any, count: int) -> None:
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status} for {count} tokens after {self.length}")
        self.length += count

    def _logits(self, row: int) -> NDArray[np.float32]:
        pointer = self._lib.llama_get_logits_ith(self._context, row)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (self.vocabulary,))
