"""What a request's steps read unchanged: inputs that are known, or computed, once at its start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .executor import TensorSpec


class HeldInputs:
    """Tensors [rows, ...] by the name of the input that steps read them as, and the sizes of their dims but B.

    Rows beyond the batch are computed with but never read: they hold zeros, and in a mask, ones.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.dims: dict[str, int] = {}
        self.ready = False

    def make_room(
        self, specs: Sequence[TensorSpec], dims: dict[str, int], rows: int, device: torch.device
    ) -> bool:
        """Have a tensor for each spec at these sizes. False where those that were there do; True for new addresses."""
        sizes = {name: size for name, size in dims.items() if name != "B"}
        self.ready = False
        if self.tensors and self.dims == sizes:
            return False
        self.dims = sizes
        # They outlive the call, as other tensors of a request do; see ``RequestState``.
        with torch.inference_mode(False):
            self.tensors = {s.name: _neutral(s.empty({**sizes, "B": rows}, device)) for s in specs}
        return True

    def copy(self) -> HeldInputs:
        """The same inputs in other memory."""
        twin = HeldInputs()
        twin.tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        twin.dims, twin.ready = dict(self.dims), self.ready
        return twin

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row ``rows[i]`` was, in place."""
        for tensor in self.tensors.values():
            tensor[: rows.numel()] = tensor.index_select(0, rows)

    def select(self, rows: Tensor, new_rows: int) -> None:
        """Keep the rows ``rows``, in new tensors of ``new_rows`` rows."""
        with torch.inference_mode(False):
            for name, old in self.tensors.items():
                new = _neutral(old.new_empty(new_rows, *old.shape[1:]))
                new[: rows.numel()] = old.index_select(0, rows)
                self.tensors[name] = new

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(t.nbytes for t in self.tensors.values())


def _neutral(tensor: Tensor) -> Tensor:
    return tensor.fill_(tensor.dtype is torch.bool)
