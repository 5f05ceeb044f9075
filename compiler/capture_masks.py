"""What a mask of transformers' ``masking_utils`` says: which keys a query sees besides those that are padding.

A model builds one mask per pattern and gives each attention one of them; its eager and SDPA attention look at nothing
else. (What a module passes as ``sliding_window`` and ``is_causal`` is for kernels that take no mask, and some modules
pass nothing.) Here each of those masks stays the 2-D mask of keys, an object of its own that its pattern is noted on,
and the note goes where the object goes, into layers that are exported by themselves too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from tilewright.ir.errors import CaptureError

_NOTE = "_tilewright_pattern"
_HIDDEN = -1e30  # finite, as a row without any key to see is to stay free of NaN


@dataclass(frozen=True)
class Pattern:
    """Query q sees key k where ``k <= q``, if causal; where ``q - k < behind``, if not 0; and where ``|q - k| <=
    around``, if not None."""

    causal: bool = False
    behind: int = 0
    around: int | None = None

    def __and__(self, other: Pattern) -> Pattern:
        behind = [p.behind for p in (self, other) if p.behind]
        around = [p.around for p in (self, other) if p.around is not None]
        return Pattern(self.causal or other.causal, min(behind, default=0), min(around, default=None))


def pattern_of(mask: Tensor | None) -> Pattern | None:
    """What is noted on a mask; None where it did not come from ``masking_utils``."""
    return getattr(mask, _NOTE, None)


def note_pattern(mask: Tensor, pattern: Pattern | None) -> None:
    """Note on a mask what ``pattern_of`` will say of it."""
    if pattern is not None:
        setattr(mask, _NOTE, pattern)


def mask_forward(
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] = causal_mask_function,
    batch_size: Any = 1,
    kv_length: Any = 1,
    device: Any = None,
    **_: Any,
) -> Tensor | None:
    """What transformers calls in place of building an array over queries and keys."""
    pattern = _read(mask_function)
    if pattern is None:
        raise CaptureError(
            f"unsupported attention: the mask pattern {mask_function.__qualname__} is neither causal, "
            "bidirectional nor a sliding window; run this model with Hugging Face instead"
        )
    if attention_mask is None:
        if not pattern.behind and pattern.around is None:
            return None  # whether it is causal the module says, as it does to PyTorch's attention
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    own = torch.ops.aten.alias.default(attention_mask)  # the same keys may be masked in other patterns too
    note_pattern(own, pattern)
    return own


def window_table(around: int, query: Tensor) -> Tensor:
    """A bias by distance f32[H, R] that hides all keys but those up to ``around`` away, of query [B, H, S, D].

    Distances beyond a table's ends count as its ends.
    """
    places = torch.arange(-around - 1, around + 2, device=query.device)
    row = torch.where(places.abs() <= around, 0.0, _HIDDEN)
    return row.expand(query.shape[1], -1)


def _read(mask_function: Callable[..., Any]) -> Pattern | None:
    """The pattern that a function of ``masking_utils`` tests, or None for one that the attention op cannot express."""
    if mask_function is causal_mask_function:
        return Pattern(causal=True)
    if mask_function is bidirectional_mask_function:
        return Pattern()
    code = mask_function.__code__
    cells = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    if code is _BEHIND:
        return Pattern(behind=int(cells[0]))
    if code is _AROUND:
        return Pattern(around=int(cells[0]))
    if code is not _ALL:
        return None
    whole = Pattern()
    for part in cells[0]:
        if (found := _read(part)) is None:
            return None
        whole = whole & found
    return whole


_BEHIND = sliding_window_overlay(1).__code__
_AROUND = sliding_window_bidirectional_overlay(1).__code__
_ALL = and_masks(causal_mask_function).__code__
