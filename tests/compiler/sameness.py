"""Compares all that a call can be seen to do: results, written arguments, and which of them share memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def assert_same_call(eager: Callable[..., Any], fast: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Call both on copies of ``args``, from one seed, and compare; ``options`` are those of :func:`assert_same`."""
    seen = []
    for function in (eager, fast):
        given = copy.deepcopy(args)
        torch.manual_seed(0)
        with torch.no_grad():
            seen.append((given, function(*given)))
    assert_same(*seen, **options)


def assert_same(expected: Any, found: Any, strides: bool = True, **tolerance: float) -> None:
    """Equal nests of values, of the same types, strides and aliases; tensors within ``tolerance``."""
    (theirs, their_spec), (ours, our_spec) = pytree.tree_flatten(expected), pytree.tree_flatten(found)
    assert their_spec == our_spec
    for a, b in zip(theirs, ours, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert not strides or a.numel() == 0 or a.stride() == b.stride()
            torch.testing.assert_close(b, a, **tolerance, equal_nan=True)
        else:
            assert a == b
    assert _sharing(ours) == _sharing(theirs)


def _sharing(values: list[Any]) -> list[tuple[int, int, bool]]:
    """Pairs of tensors that share memory, and whether they are one object."""
    tensors = [(n, v) for n, v in enumerate(values) if isinstance(v, Tensor) and v.numel()]
    return [
        (n, m, a is b)
        for n, a in tensors
        for m, b in tensors
        if n < m and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    ]
