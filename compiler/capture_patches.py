"""What capture has to know about single architectures. Nothing else in the compiler may name one.

Keyed by ``config.model_type``.
"""

from __future__ import annotations

from typing import Literal

PositionRule = Literal["past", "mask"]

# How a decoder numbers its tokens when the caller gives no position_ids. Most count on from the length of
# the past ("past"); these count the ones of the attention mask, so that left padding shifts nothing ("mask").
_POSITIONS_FROM_MASK = frozenset({"opt", "xglm"})


def position_rule(model_type: str) -> PositionRule:
    """The rule by which a decoder's plain forward makes up position_ids that were not given."""
    return "mask" if model_type in _POSITIONS_FROM_MASK else "past"
