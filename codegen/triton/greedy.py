"""The greedy choice of a token, and all that a decode step keeps of it, as two kernels.

In PyTorch's operations it is some fifteen launches of a few microseconds each (a copy, an argmax, tests for ends of
sequences, indexed copies). Here the vocabulary is cut into parts, of each of which a program of ``best`` finds the
highest score; ``keep_b<rows>``, a kernel of one program for each batch bucket, takes the best of the parts and writes
it wherever a step keeps it.

As with torch.argmax, the first of equal scores counts, and a NaN is higher than any number (and, here, as infinity).
"""

from __future__ import annotations

from collections.abc import Sequence

from sympy import Expr, Integer

from tilewright.ir.index import sym
from tilewright.ir.types import DType, next_power_of_two

from .dependence import wait_for_predecessor
from .device import H100, Device
from .kernel import KernelSource, signature
from .pointwise_ops import POINTER_TYPES
from .program import TritonSource, print_source
from .text import Names, Scope

_PART = 1024  # scores of a program at least
_MOST_PARTS = 64


def greedy_source(
    vocab: int, dtype: DType, buckets: Sequence[int], interpret: bool = False, device: Device = H100
) -> TritonSource:
    """A module with the kernels for logits [rows, ``vocab``], of batches up to each of ``buckets``.

    Their dims: B, rows in use; E, ends of sequences; M, the length of a row of sequences; P, the pad token.
    """
    dependent = device.has_dependent_launch and not interpret
    kernels = [_best(vocab, dtype, dependent)]
    kernels += [_keep(rows, vocab, dependent) for rows in buckets]
    return TritonSource("greedy", print_source("greedy", tuple(kernels), ""), tuple(kernels))


def parts_of(vocab: int) -> int:
    """Parts that a vocabulary is cut into."""
    return -(-vocab // _part(vocab))


def _part(vocab: int) -> int:
    """Scores of a part."""
    return next_power_of_two(max(_PART, -(-vocab // _MOST_PARTS)))


def _best(vocab: int, dtype: DType, dependent: bool) -> KernelSource:
    """The highest score of a part, without ends that come too early, and its place."""
    pointers = (
        ("logits", POINTER_TYPES[dtype]), ("eos", "i64"), ("column", "i64"), ("least", "i64"), ("scores", "fp32"),
        ("places", "i32"),
    )  # fmt: skip
    size, parts = _part(vocab), parts_of(vocab)
    body = f"""
    pid = tl.program_id(0)
    row = pid // {parts}
    at = pid % {parts} * {size} + tl.arange(0, {size})
    score = tl.load(logits + row * {vocab} + at, mask=at < {vocab}, other=float("-inf")).to(tl.float32)
    score = tl.where(score != score, float("inf"), score)
    if tl.load(column) < tl.load(least):
        for e in range(E):
            score = tl.where(at == tl.load(eos + e), float("-inf"), score)
    best = tl.max(score, axis=0)
    tl.store(scores + pid, best)
    tl.store(places + pid, tl.min(tl.where((at < {vocab}) & (score == best), at, {vocab}), axis=0))
"""
    return _kernel("best", pointers, ("B", "E"), sym("B") * parts, body, dependent)


def _keep(rows: int, vocab: int, dependent: bool) -> KernelSource:
    """The best part of each row, its end if it is one, and the step's results."""
    pointers = (
        ("scores", "fp32"), ("places", "i32"), ("eos", "i64"), ("open", POINTER_TYPES[DType.bool]), ("ids", "i64"),
        ("sequences", "i64"), ("column", "i64"),
    )  # fmt: skip
    parts = parts_of(vocab)
    height, width = next_power_of_two(rows), next_power_of_two(parts)
    body = f"""
    row = tl.arange(0, {height})
    part = tl.arange(0, {width})[None, :]
    at = row[:, None] * {parts} + part
    ok = (row[:, None] < B) & (part < {parts})
    score = tl.load(scores + at, mask=ok, other=float("-inf"))
    place = tl.load(places + at, mask=ok, other={vocab})
    best = tl.max(score, axis=1)
    token = tl.min(tl.where(score == best[:, None], place, {vocab}), axis=1).to(tl.int64)
    is_open = tl.load(open + row, mask=row < B, other=0) != 0
    token = tl.where(is_open, token, P)
    for e in range(E):
        is_open = is_open & (token != tl.load(eos + e))
    end = tl.load(column)
    tl.debug_barrier()  # every thread has read the column before one moves it on
    tl.store(open + row, is_open.to(tl.uint8), mask=row < B)
    tl.store(ids + row, token, mask=row < B)
    tl.store(sequences + row * M + end, token, mask=(row < B) & (row * 0 + end < M))
    tl.store(column, end + 1)
"""
    warps = min(32, max(4, height * width // 1024))  # of large batches, which would fill a thread's registers
    return _kernel(f"keep_b{rows}", pointers, ("B", "E", "M", "P"), Integer(1), body, dependent, warps)


def _kernel(
    name: str,
    pointers: tuple[tuple[str, str], ...],
    dims: tuple[str, ...],
    programs: Expr,
    body: str,
    dependent: bool,
    warps: int = 4,
) -> KernelSource:
    scope = Scope(Names())
    if dependent:
        wait_for_predecessor(scope)
    arguments = [*(n for n, _ in pointers), *dims]
    lines = [*signature(name, arguments, dims, frozenset()), *scope.lines, body.strip("\n")]
    options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
    options |= {"launch_pdl": True} if dependent else {}
    return KernelSource(name, "\n".join(lines), pointers, dims, programs, tuple(options.items()), ("greedy",))
