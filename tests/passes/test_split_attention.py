"""How many chunks a context is cut into."""

from __future__ import annotations

import pytest

from tilewright.passes.split_attention import chunks


@pytest.mark.parametrize(
    ("pairs", "multiprocessors", "expected"),
    [
        (32, 0, 16),  # a machine of unknown size: as many as are allowed
        (1, 132, 16),
        (32, 132, 16),  # 17 would be needed
        (128, 132, 8),  # 528 programs are wanted: 4 would give 512
        (132, 132, 4),
        (263, 132, 4),
        (264, 132, 0),
        (2048, 132, 0),
    ],
)
def test_chunks(pairs: int, multiprocessors: int, expected: int) -> None:
    """A power of two that gives each multiprocessor four programs; whole where there are two without."""
    assert chunks(pairs, 16, multiprocessors) == expected
