"""Block sizes of a segment and the launch options of its kernel, and those that need no search."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.ir.types import next_power_of_two


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
    group: int = 0
    """Tiles of rows that share each tile of a product's columns before the next group of rows begins; 0 for all."""
    descriptors: bool = False
    """Whether a product's factors that are plain matrices are copied by TMA (see ``descriptors``)."""
    persistent: int = 0
    """Programs that walk all tiles of the kernel between them; 0 for a program per tile."""
    agreed: bool = False
    """Whether an attention's weights are relative to a maximum that is agreed on beforehand (see ``softmax``)."""
    dependent: bool = False
    """Whether the kernel may start before its predecessor has ended (see ``dependence``)."""


def reduction_tile(rows: int, extent: int | None, interpret: bool, sharers: int = 1, own: int = 0) -> Tile:
    """Tile of a row reduction; ``extent`` None when it is known at run time only. Of ``sharers`` neighbours, which
    share a reduction and have one over ``own`` elements each, as many as divide them."""
    largest = 8192 if interpret else 4096
    block_k = min(largest, next_power_of_two(extent)) if extent is not None else 512
    budget = 65536 if interpret else 2048
    block_m = max(1, min(next_power_of_two(min(rows, 1024)), budget // block_k))
    if sharers > 1 and own:
        block_m = max(block_m, min(sharers & -sharers, budget // next_power_of_two(own)))
    warps = 8 if block_k >= 4096 else 4
    return Tile(block_m=block_m, block_n=block_k, block_k=block_k, num_warps=warps)


def pointwise_tile(points: int, interpret: bool) -> Tile:
    """Tile of an elementwise kernel."""
    largest = 65536 if interpret else 512
    return Tile(block_n=min(largest, max(16, next_power_of_two(points))))
