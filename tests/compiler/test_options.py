"""What options decide before anything is compiled."""

from __future__ import annotations

import pytest
import torch

from tilewright.options import Options


@pytest.mark.parametrize(
    ("backend", "batch_sizes", "length", "chunk"),
    [
        ("triton", (1,), 8192, 2048),
        ("triton", (1, 16), 8192, 2048),
        ("triton", (24,), 8192, 1024),
        ("triton", (200,), 8192, 512),
        ("triton", (1,), 100, 100),
        ("cpp", (1,), 8192, 512),
    ],
)
def test_pieces_of_prompts_are_long_as_far_as_a_batch_of_them_has_room(
    backend: str, batch_sizes: tuple[int, ...], length: int, chunk: int
) -> None:
    """A GPU is filled, and an arena for the largest batch does not grow without bound."""
    options = Options(batch_sizes, length, "", "", "off", backend, torch.device("cpu"), None)
    assert options.chunk == chunk
