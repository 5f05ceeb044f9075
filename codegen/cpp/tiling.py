"""How generated C++ walks its matrix products, and the other ways that a tuner may try.

* Few rows (decode): a thread multiplies one row of weights with all rows of activations. ``unroll`` vectors of it per
  iteration go into sums of their own, since one sum would wait for its own latency; with more rows of activations there
  are enough sums without. ``weight_rows`` are walked side by side, which saves loads of activations but opens streams.
* Many rows (prefill): ``tile_rows`` rows of activations meet a panel of weights in registers; what fits differs with
  the instruction set, so 0 leaves it to the header. Up to ``row_block`` rows are prepared at a time: their prologue is
  computed once for all columns, and each panel of weights is packed once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.codegen.tunables import NONE, Changes


@dataclass(frozen=True)
class Tile:
    """The walk of one product. Every field can be tuned."""

    unroll: int = 1
    weight_rows: int = 1
    tile_rows: int = 0
    row_block: int = 1024


def few_rows_tile(rows: int) -> Tile:
    """The walk of a product with so few rows of activations that a gemv applies (see ``Group.few_rows``)."""
    return Tile(unroll=4 if rows == 1 else 2 if rows <= 4 else 1)


def few_rows_candidates(rows: int) -> tuple[Changes, ...]:
    """Other walks worth a measurement, the default first."""
    usual = few_rows_tile(rows).unroll
    unrolls = [{"unroll": n} for n in (usual // 2, usual * 2) if n >= 1]
    return (NONE, *unrolls, {"weight_rows": 2})


def many_rows_candidates() -> tuple[Changes, ...]:
    """As :func:`few_rows_candidates`, for a prompt."""
    return (NONE, {"tile_rows": 4}, {"tile_rows": 8}, {"row_block": 128})
