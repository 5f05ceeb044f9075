"""Block sizes: a small cost heuristic, and the place where a tuner may override it.

What it aims at, per kind of kernel:

* product with few rows (decode): bound by reading the weight, so enough programs to fill the GPU, and about 4096
  weight elements in flight per program;
* product with few rows because only the last positions' logits are wanted: dim L counts as 1, as in generation;
* product with many rows (prefill): 64 x 64 tiles, 128 x 128 once there are enough columns to fill the GPU with them,
  in half precision only, where tensor cores need them;
* reductions: whole rows in registers up to 8192 elements, one row per program when it is long;
* everything for the interpreter: few programs with large blocks, since each costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sympy import Expr

from tilewright.ir.index import sym

from .text import next_power_of_two

PROGRAMS = 264
"""Programs wanted at least: two for each of an H100's 132 multiprocessors."""


@dataclass(frozen=True)
class Tile:
    """Block sizes of one segment, and the launch options of its kernel. Every field can be tuned."""

    block_m: int = 1
    block_n: int = 1
    block_k: int = 1
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int = 0
    """Registers per thread that the assembler may use; 0 leaves it to its own (sometimes too thrifty) choice."""
    transposed: bool = False
    """Whether a product's tile is columns x rows, so that few rows stand on the short side of the tensor cores."""


def upper_bound(extent: Expr, largest: Mapping[str, int]) -> int:
    """The largest value of an extent; 2**31 when a dim has no known range."""
    value = extent.subs({sym(name): size for name, size in largest.items()})
    return int(value) if value.is_Integer else 2**31


def product_tile(rows: int, columns: int, k: int, dots: int, itemsize: int, interpret: bool) -> Tile:
    """Tile of a product with ``rows`` rows at most (0: a single row without a row axis)."""
    if interpret:
        return Tile(
            block_m=min(64, max(16, next_power_of_two(rows))),
            block_n=min(512, max(16, next_power_of_two(columns))),
            block_k=min(512, max(16, next_power_of_two(k))),
        )
    if rows == 0:
        return _vector_tile(columns, k, dots, itemsize)
    if rows < 32:
        block_n = 16
        while block_n < 64 // dots and columns // (2 * block_n) >= PROGRAMS:
            block_n *= 2
        return Tile(
            16,
            block_n,
            _block_k(k, 128 if itemsize == 2 else 64),
            num_warps=4,
            num_stages=4 if itemsize == 2 else 3,
        )
    if itemsize == 2 and columns >= 4096 and rows >= 128:
        return Tile(128, _share(192, dots), _block_k(k, 64), num_warps=8, num_stages=3)
    if itemsize > 2:
        # In float32 products run on the plain units, and their operands need the registers of eight warps.
        return Tile(64, _share(96, dots), _block_k(k, 16), num_warps=8, num_stages=2, max_registers=255)
    return Tile(64, _share(96, dots), _block_k(k, 64), num_warps=4, num_stages=3)


def _share(columns: int, dots: int) -> int:
    """The largest power of two with which the tiles of all ``dots`` have at most ``columns`` columns together."""
    return 1 << max(4, (columns // dots).bit_length() - 1)


def _block_k(k: int, largest: int) -> int:
    """The block size along K: a divisor of K where there is one, as a masked tail costs time."""
    size = min(largest, max(16, next_power_of_two(k)))
    while size > 32 and k % size:
        size //= 2
    return size


def _vector_tile(columns: int, k: int, dots: int, itemsize: int) -> Tile:
    """About 4096 weight elements per program and iteration, and at least ``PROGRAMS`` programs where possible."""
    block_n = 8
    while block_n > 1 and -(-columns // block_n) < PROGRAMS:
        block_n //= 2
    budget = 8192 // itemsize // dots
    candidates = [c for c in (128, 256, 512, 1024, 2048) if c * block_n <= budget or c == 128]
    # A block costs its elements, masked or not, and about as much as 128 of them to begin with.
    block_k = min(candidates, key=lambda c: (-(-k // c) * (c + 128), -c))
    return Tile(1, block_n, block_k, num_warps=4, num_stages=2)


def reduction_tile(rows: int, extent: int | None, interpret: bool) -> Tile:
    """Tile of a row reduction; ``extent`` None when it is known at run time only."""
    largest = 8192 if interpret else 4096
    block_k = min(largest, next_power_of_two(extent)) if extent is not None else 512
    budget = 65536 if interpret else 2048
    block_m = max(1, min(next_power_of_two(min(rows, 1024)), budget // block_k))
    warps = 8 if block_k >= 4096 else 4
    return Tile(block_m=block_m, block_n=block_k, block_k=block_k, num_warps=warps)


def pointwise_tile(points: int, interpret: bool) -> Tile:
    """Tile of an elementwise kernel."""
    largest = 65536 if interpret else 512
    return Tile(block_n=min(largest, max(16, next_power_of_two(points))))


def attention_tile(queries: int, context: int, head_size: int, itemsize: int, interpret: bool) -> Tile:
    """Tile of attention: BLOCK_M (query, head) pairs of one KV head against BLOCK_N positions."""
    if interpret:
        return Tile(
            min(128, max(16, next_power_of_two(queries))), min(512, max(16, next_power_of_two(context)))
        )
    if itemsize == 2 and head_size * itemsize >= 256 and queries >= 128:
        return Tile(128, 64 if head_size <= 128 else 32, num_warps=8, num_stages=2)
    block_m = min(64, max(16, next_power_of_two(queries)))
    if itemsize > 2:
        return Tile(block_m, 16 if block_m > 16 else 32, num_warps=4, num_stages=2)
    return Tile(block_m, 64 if head_size <= 128 else 32, num_warps=4, num_stages=2)
