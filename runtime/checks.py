"""Checks of what callers hand in; each raises InputError that says what is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewright.ir.program import InputError

from .executor import TensorSpec


def require_tensor(name: str, value: object) -> None:
    """Raise InputError for anything but a tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(value).__name__}")


def require_mask(name: str, value: object) -> None:
    """Raise InputError for anything but a tensor of zeros and ones, or of truth values."""
    require_tensor(name, value)
    assert isinstance(value, Tensor)
    remedy = f"pass {name} as 1 or True for what counts and 0 or False for what does not"
    if value.is_floating_point() or value.is_complex():
        raise InputError(f"{name} must be of an integer or bool dtype, got {value.dtype}; {remedy}")
    if value.dtype == torch.bool or value.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(value.to(torch.int64)))
    if low < 0 or high > 1:
        raise InputError(f"{name} holds {low if low < 0 else high}; {remedy}")


def check_integers(spec: TensorSpec, value: Tensor) -> None:
    """Raise InputError when an integer of ``value`` does not fit the input's dtype."""
    if value.dtype in (spec.dtype, torch.bool) or spec.dtype.is_floating_point:
        return
    limits = torch.iinfo(spec.dtype)
    low, high = (int(v) for v in torch.aminmax(value.to(torch.int64)))
    # What is beyond int64 became negative on the way.
    beyond = value.dtype == torch.uint64 and low < 0
    if beyond or low < limits.min or high > limits.max:
        worst = "a value beyond int64" if beyond else low if low < limits.min else high
        raise InputError(f"{spec.name} holds {worst}, which does not fit its dtype {spec.dtype}")


def check_bounds(spec: TensorSpec, value: Tensor) -> None:
    """Raise InputError when an index is outside of the table that it picks rows of."""
    if spec.bounds is None:
        return
    low, high = (int(v) for v in torch.aminmax(value))
    least, most = spec.bounds
    if low < least or high > most:
        raise InputError(
            f"{spec.name} holds {low if low < least else high}, but it indexes a table of {most + 1} entries: values "
            f"from {least} to {most}"
        )
