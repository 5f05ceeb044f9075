"""Which form of a product is fastest at which number of rows M: a matrix-vector product, a flat one, or a general one.

FlashDecoding++ (Hong et al., 2023) chooses by two thresholds per shape, the rows at which these change places, and
finds them by measurement. Here the cost model gives them, which is an estimate. What a tuner chose has a form too.

    GEMV        products of one row each, in one launch; each reads the weight
    flat GEMM   one tile along M holds all rows; on Hopper it may be transposed
    GEMM        tiles of many rows
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .candidates import FEW_ROWS, code_tiles, few_rows_tiles, integer_tiles, many_rows_tiles, vector_tiles
from .cost_model import seconds
from .device import Device
from .tiling import Tile
from .work import ProductWork

GEMV, FLAT, GEMM = "GEMV", "flat GEMM", "GEMM"
MOST_ROWS = 256


@dataclass(frozen=True)
class Thresholds:
    """flat_from: the least M from which on GEMV is fastest no more. gemm_from: the least from which on GEMM always is.
    None: beyond ``MOST_ROWS``."""

    flat_from: int | None
    gemm_from: int | None


def form_of(tile: Tile, rows: int) -> str:
    """The form that a kernel with this tile has."""
    if rows <= 1:
        return GEMV
    return FLAT if tile.transposed or rows <= FEW_ROWS else GEMM


def form_seconds(work: ProductWork, rows: int, device: Device) -> dict[str, float]:
    """The cost model's time of each form with its best tile, at ``rows`` rows; infinite for one that does not fit."""
    one = replace(work, rows=0, batch=work.batch * rows)
    many = replace(work, rows=rows, integers=False, group=0)
    vectors = code_tiles(one, device) if work.integers else vector_tiles(one, device)
    flat = [seconds(many, tile, device) for tile in few_rows_tiles(many, device)]
    few = work.of_rows(rows)
    flat += [seconds(few, tile, device) for tile in integer_tiles(few, device)]
    return {
        GEMV: min(seconds(one, tile, device) for tile in vectors),
        FLAT: min(flat),
        GEMM: min(seconds(many, tile, device) for tile in many_rows_tiles(many)),
    }


def thresholds(work: ProductWork, device: Device) -> Thresholds:
    """Where the forms of a product change places, for M of 1 to ``MOST_ROWS``."""
    fastest = [
        min(times, key=times.__getitem__)
        for times in (form_seconds(work, rows, device) for rows in range(1, MOST_ROWS + 1))
    ]
    last_vector = max((m for m, form in enumerate(fastest, 1) if form == GEMV), default=0)
    last_other = max((m for m, form in enumerate(fastest, 1) if form != GEMM), default=0)
    return Thresholds(
        flat_from=last_vector + 1 if last_vector < MOST_ROWS else None,
        gemm_from=last_other + 1 if last_other < MOST_ROWS else None,
    )
