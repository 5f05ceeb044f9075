"""What a mask function of transformers' ``masking_utils`` lets a query see, as an interval of distances.

Such a function compares the positions of a query and a key, and may be put together of others, a model's own among
them. It is called once, with positions that stand for all of them and give, for each comparison, the distances
``key - query`` for which it holds:

    kv_idx <= q_idx                                         up to 0 (causal)
    (kv_idx <= q_idx) & (kv_idx > q_idx - 4)                -3 to 0 (causal, with a window)
    abs(q_idx - kv_idx) <= 2                                -2 to 2 (a window on both sides)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Abs, Expr

_BATCH, _HEAD, _QUERY, _KEY = sympy.symbols("batch head query key", integer=True, nonnegative=True)
_DISTANCE = _KEY - _QUERY


class InexpressibleError(Exception):
    """A mask that is no interval of distances."""


@dataclass(frozen=True)
class Distances:
    """A query sees the keys for which ``lowest <= key - query <= highest``; none, if that holds for no distance.

    What transformers asks of a tensor of bools while it puts functions together, it gives too.
    """

    lowest: float = -math.inf
    highest: float = math.inf
    device = torch.device("cpu")

    def __and__(self, other: object) -> Distances:
        other = _distances(other)
        return Distances(max(self.lowest, other.lowest), min(self.highest, other.highest))

    def __or__(self, other: object) -> Distances:
        other = _distances(other)
        if self.lowest > self.highest or other.lowest > other.highest:
            return other if self.lowest > self.highest else self
        if max(self.lowest, other.lowest) > min(self.highest, other.highest) + 1:
            raise InexpressibleError("two ranges of keys with others between them")
        return Distances(min(self.lowest, other.lowest), max(self.highest, other.highest))

    __rand__, __ror__ = __and__, __or__

    def __bool__(self) -> bool:
        raise InexpressibleError("a decision by what a query sees")

    def to(self, *_: object) -> Distances:
        return self


ALL = Distances()
CAUSAL = Distances(highest=0)
NOTHING = Distances(math.inf, -math.inf)


def distances_of(mask_function: Callable[..., Any]) -> Distances:
    """The distances of keys that a query sees. Raises InexpressibleError where they are no interval, or not the same
    for all queries, heads and requests."""
    try:
        return _distances(mask_function(*(_Index(symbol) for symbol in (_BATCH, _HEAD, _QUERY, _KEY))))
    except (TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise InexpressibleError(str(error)) from error  # by operations that only tensors know


def _distances(found: object) -> Distances:
    if isinstance(found, Distances):
        return found
    if isinstance(found, bool) or (isinstance(found, torch.Tensor) and not found.ndim):
        return ALL if found else NOTHING
    raise InexpressibleError(f"{type(found).__name__} in place of a comparison")


@dataclass(frozen=True, eq=False)
class _Index:
    """A number that a mask function computes of positions, all of them at once."""

    value: Expr

    def __add__(self, other: object) -> _Index:
        return _Index(self.value + _expr(other))

    def __sub__(self, other: object) -> _Index:
        return _Index(self.value - _expr(other))

    def __rsub__(self, other: object) -> _Index:
        return _Index(_expr(other) - self.value)

    __radd__ = __add__

    def __neg__(self) -> _Index:
        return _Index(-self.value)

    def __abs__(self) -> _Index:
        return _Index(Abs(self.value))

    def __le__(self, other: object) -> Distances:
        return _at_most_zero(self.value - _expr(other))

    def __lt__(self, other: object) -> Distances:
        return _at_most_zero(self.value - _expr(other) + 1)

    def __ge__(self, other: object) -> Distances:
        return _at_most_zero(_expr(other) - self.value)

    def __gt__(self, other: object) -> Distances:
        return _at_most_zero(_expr(other) - self.value + 1)

    def __eq__(self, other: object) -> Any:
        return (self <= other) & (self >= other)

    def __ne__(self, other: object) -> Any:
        return (self < other) | (self > other)

    def __bool__(self) -> bool:
        raise InexpressibleError("a decision by a position")

    __hash__ = None  # type: ignore[assignment]

    def new_ones(self, *_: object, **__: object) -> Distances:
        return ALL

    def new_zeros(self, *_: object, **__: object) -> Distances:
        return NOTHING


def _expr(number: object) -> Expr:
    if isinstance(number, _Index):
        return number.value
    if isinstance(number, int):
        return sympy.Integer(number)
    raise InexpressibleError(f"a position and {type(number).__name__} in one expression")


def _at_most_zero(value: Expr) -> Distances:
    """The distances for which a whole number, computed of positions, is 0 or less."""
    value = sympy.expand(value)
    if value.is_nonpositive:
        return ALL
    if value.is_positive:
        return NOTHING
    if (rest := value - _DISTANCE).is_Integer:
        return Distances(highest=-int(rest))
    if (rest := value + _DISTANCE).is_Integer:
        return Distances(lowest=int(rest))
    for absolute in value.atoms(Abs):
        (inner,) = absolute.args
        if (rest := value - absolute).is_Integer:
            return _at_most_zero(inner + rest) & _at_most_zero(rest - inner)
    raise InexpressibleError(f"a condition on {value}")
