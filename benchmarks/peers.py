"""What the vendor's library takes for the product or the attention that one of our kernels computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tilewright.ir.module import Op
from tilewright.ir.program import Step
from tilewright.ir.types import concrete
from tilewright.trials import wait

_COLD_BYTES = 256 << 20  # of operands that take turns, so that none is in a cache when it is read
_RUNS = 24
_QUEUEING = 20_000_000
"""Cycles that the device waits for the host, some 10 ms: calls of torch.compile's code take up to 100 µs there."""


def peer_seconds(run: Callable[[], object], device: torch.device, runs: int = _RUNS) -> float:
    """Seconds of a run: on a GPU the mean over several in a row, between two events; elsewhere the best."""
    run()
    wait(device)
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_QUEUEING)  # the host queues everything meanwhile
        begin.record()
        for _ in range(runs):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3 / runs
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def of(step: Step, dims: Mapping[str, int], device: torch.device) -> float:
    """Seconds of the vendor's library for a kernel's products, with cold operands, or its attention; 0 for others."""
    total = 0.0
    for op in step.op.body:
        if op.opcode == "matmul" and op.operands[1].type.rank == 2:
            total += _product(op, dims, device)
        elif op.opcode in ("attention", "attention_split"):
            total += _attention(op, dims, device)
    return total


def cold_copies(nbytes: int) -> int:
    """How many copies of so many bytes have to take turns for none to be in a cache; at most 32."""
    return max(1, min(32, _COLD_BYTES // max(1, nbytes)))


def _product(op: Op, dims: Mapping[str, int], device: torch.device) -> float:
    a = _random(concrete(op.operands[0].shape, dims), op, device)
    shape = concrete(op.operands[1].shape, dims)
    copies = cold_copies(shape[0] * shape[1] * a.element_size())
    weights = cycle([_random(shape, op, device) for _ in range(copies)])
    return peer_seconds(lambda: torch.nn.functional.linear(a, next(weights)), device)


def _attention(op: Op, dims: Mapping[str, int], device: torch.device) -> float:
    shapes = [concrete(v.shape, dims) for v in op.operands[:3]]
    q, k, v = (_random(shape, op, device) for shape in shapes)
    causal = op.attr("causal") and q.shape[2] > 1
    return peer_seconds(
        lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]),
        device,
    )


def _random(shape: tuple[int, ...], op: Op, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=op.operands[0].dtype.torch, device=device)
