"""What a mask of transformers' ``masking_utils`` says: which keys a query sees besides those that are padding.

A model builds one mask per kind of layer and gives each attention one of them; its eager and SDPA attention look at
nothing else. (What a module passes as ``sliding_window`` and ``is_causal`` is for kernels that take no mask, and some
modules pass nothing.) Here each of those masks stays the 2-D mask of keys, an object of its own, on which the distances
of the keys that it shows are noted, and the note goes where the object goes, into layers that are exported by
themselves too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from tilewright.ir.errors import CaptureError

from .capture_distances import ALL, CAUSAL, Distances, InexpressibleError, distances_of

_NOTE = "_tilewright_distances"


def distances_in(mask: Tensor | None) -> Distances | None:
    """What is noted on a mask; None where it did not come from ``masking_utils``."""
    return getattr(mask, _NOTE, None)


def note_distances(mask: Tensor, distances: Distances | None) -> None:
    """Note on a mask what ``distances_in`` will say of it."""
    if distances is not None:
        setattr(mask, _NOTE, distances)


def bounds_of(distances: Distances) -> dict[str, bool | int]:
    """The attributes of an attention whose queries see keys at these distances. Raises CaptureError where queries do
    not see themselves; masks of that kind may be made and not be used, as by models whose window is 0."""
    if not distances.lowest <= 0 <= distances.highest:
        raise CaptureError(
            "unsupported attention: a mask hides each query from itself; run this model with Hugging Face instead"
        )
    causal = distances.highest == 0
    window = 0 if math.isinf(distances.lowest) else 1 - int(distances.lowest)
    ahead = 0 if causal or math.isinf(distances.highest) else 1 + int(distances.highest)
    return {"causal": causal, "window": window, "ahead": ahead}


def mask_forward(
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] = causal_mask_function,
    batch_size: Any = 1,
    kv_length: Any = 1,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: Any = None,
    **_: Any,
) -> Tensor | None:
    """What transformers calls in place of building an array over queries and keys."""
    try:
        distances = distances_of(mask_function)
    except InexpressibleError as error:
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise CaptureError(
            f"unsupported attention: the mask pattern {name} does not show each query the keys up to some distance "
            f"before and after it ({error}); run this model with Hugging Face instead"
        ) from error
    if attention_mask is None:
        if (allow_is_causal_skip and distances == CAUSAL) or (
            allow_is_bidirectional_skip and distances == ALL
        ):
            return None  # whether it is causal the module says, as it does to PyTorch's attention
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    own = torch.ops.aten.alias.default(attention_mask)  # the same keys may be masked in other ways too
    note_distances(own, distances)
    return own
