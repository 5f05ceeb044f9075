"""The part of a request's state that has one size: what its recurrent layers remember, all in one piece of memory.

In one piece it is cleared, and kept for the case that a step fails, by one call, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .executor import RecurrentSlot

_ALIGNMENT = 64
"""Bytes; a cache line, and a full AVX-512 vector."""


class RecurrentState:
    """``buffers[slot]`` is [rows, *slot.row], zeros at first; all are views of ``memory``, bytes."""

    def __init__(self, slots: Sequence[RecurrentSlot], rows: int, device: torch.device) -> None:
        self.slots, self.rows = slots, rows
        sizes = [-(-slot.nbytes(rows) // _ALIGNMENT) * _ALIGNMENT for slot in slots]
        self.memory = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self.buffers: dict[str, Tensor] = {}
        for slot, piece in zip(slots, self.memory.split(sizes), strict=True):
            whole = piece[: slot.nbytes(rows)].view(slot.dtype)
            self.buffers[slot.name] = whole.view(rows, *slot.row)

    def copy(self) -> RecurrentState:
        """The same in memory of its own."""
        twin = RecurrentState(self.slots, self.rows, self.memory.device)
        twin.memory.copy_(self.memory)
        return twin
