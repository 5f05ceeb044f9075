"""Builds the kernels by which decode steps on a GPU choose their tokens."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from tilewright.codegen.triton import compiling
from tilewright.codegen.triton.greedy import greedy_source, parts_of
from tilewright.ir.errors import KernelBuildError
from tilewright.runtime.device import is_interpreting
from tilewright.runtime.executor import EngineSpec
from tilewright.runtime.greedy import GreedyKernels
from tilewright.runtime.kernel_modules import write_module

from .estimates import gpu
from .options import Options
from .settings import cache_dir


def greedy_kernels(options: Options, spec: EngineSpec, buckets: Sequence[int]) -> GreedyKernels | None:
    """Kernels that choose tokens in decode steps of ``buckets``, ready to be launched; None where steps go through the
    host, or give no scores."""
    if options.backend != "triton" or spec.kind != "decoder":
        return None
    logits = spec.outputs[0].type
    if int(logits.shape[-1]) < spec.vocab_size:
        return None
    vocab, device, interpreting = int(logits.shape[-1]), gpu(options.device), is_interpreting()
    source = greedy_source(vocab, logits.dtype, buckets, interpreting, device)
    path = write_module(cache_dir() / "triton", source.text)
    kernels = GreedyKernels(path, parts_of(vocab))
    if interpreting:
        return kernels
    compiling.compile_ahead(((kernels.functions[k.name], k) for k in source.kernels), device.arch)
    try:
        kernels.launch_once(torch.zeros(1, vocab, dtype=logits.dtype.torch, device=options.device), buckets)
    except KernelBuildError as error:
        warnings.warn(f"{error}; tokens are chosen by PyTorch's operations", stacklevel=2)
        return None
    return kernels
