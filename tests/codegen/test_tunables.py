"""Tunables: what may be changed of a tile, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tilewright.codegen.tunables import Changes, text_of, tuned
from tilewright.ir.errors import OptionError


@dataclass(frozen=True)
class _Tile:
    block_n: int = 16
    unroll: int = 4
    transposed: bool = False
    registers: int = 0


def test_fields_are_replaced_and_keep_their_type() -> None:
    assert tuned(_Tile(), {"block_n": 64, "transposed": 1}) == _Tile(64, 4, True)
    assert tuned(_Tile(), {"transposed": 1}).transposed is True
    assert tuned(_Tile(), {}) == _Tile()
    assert tuned(_Tile(registers=255), {"registers": 0}).registers == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_q": 1}, "unknown tunable 'block_q'; a kernel has block_n, registers, transposed, unroll"),
        ({"block_n": 48}, "power of two"),
        ({"unroll": 0}, "unroll=0"),
        ({"registers": -1}, "registers=-1"),
        ({"transposed": 2}, "must be 0 or 1"),
    ],
)
def test_nonsense_is_refused_by_name(changes: Changes, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tuned(_Tile(), changes)


def test_changes_print_for_people() -> None:
    assert text_of({}) == "default"
    assert text_of({"block_n": 32, "num_warps": 8}) == "block_n=32 num_warps=8"
