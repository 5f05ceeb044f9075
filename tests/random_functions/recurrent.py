"""Recurrent layers: moves whose results depend on what a request remembers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sympy import Integer

from tilewright.ir.index import sym
from tilewright.ir.recurrent import wide
from tilewright.ir.types import TensorType, Value

from .draft import RandomFunction, Spec
from .products import project


def recurrent(fn: RandomFunction) -> Value | None:
    """A convolution over the last tokens, a scan whose state decays, or linear attention, of [B, S, C]."""
    x = fn.floats(
        lambda v: v.type.rank == 3 and v.shape[:2] == (sym("B"), sym("S")) and v.shape[2].is_Integer
    )
    if x is None:
        return None
    x, slot = fn.bounded(x, 4), f"recurrent{len(fn.slots)}"
    kind = fn.number(0, 2)
    if kind == 0:
        taps = Integer(fn.number(2, 4))
        operands = [x, fn.weight(TensorType(x.dtype, (taps, x.shape[2])))]
        operands += [fn.weight(TensorType(x.dtype, x.shape[2:]))] if fn.number(0, 1) else []
        y, state = fn.builder.add_multi("causal_conv1d", *operands, slot=slot)
        size = 4.0 * int(taps) + 1
    elif kind == 1:
        y, state, size = _linear_attention(fn, x, slot)
    else:
        states = Integer(fn.number(1, 3))
        dt = fn.add("sigmoid", fn.bounded(project(fn, x, int(x.shape[2]))), spec=Spec(0, 1, False))
        decay = fn.weight(TensorType(wide(x.dtype), (states, x.shape[2])), Spec(-4, -1))
        ends = [fn.bounded(project(fn, x, int(states)), 2) for _ in range(2)]
        y, state = fn.builder.add_multi("selective_scan", x, dt, decay, *ends, slot=slot)
        size = 2.0 * int(states) * (1 + 8 * fn.highs["S"])
    fn.slots[slot] = state.type
    fn.specs[y] = Spec(-size, size, False)
    return y


def _linear_attention(fn: RandomFunction, x: Value, slot: str) -> tuple[Value, Value, float]:
    """Heads with what they are given made of x, too: the result, the state, and a bound of the result.

    Keys shorter than 1 keep what is taken away no more than what was there.
    """
    groups, shared, depth, states = (fn.number(1, n) for n in (2, 2, 3, 3))
    heads, dtype = groups * shared, wide(x.dtype)

    def made(last: Sequence[int], most: float) -> Value:
        flat = fn.bounded(project(fn, x, math.prod(last)), most)
        return fn.reshape(flat, (*x.shape[:2], *(Integer(n) for n in last)))

    q, k = (fn.cast(made((groups, states), most), dtype) for most in (1, 0.5))
    rate = fn.add("sigmoid", made((heads, fn.pick((1, states))), 4), spec=Spec(0, 1, False))
    operands = [q, k, made((heads, depth), 4), fn.cast(fn.add("neg", rate, spec=Spec(-1, 0, False)), dtype)]
    if fn.number(0, 1):
        operands.append(fn.cast(fn.add("sigmoid", made((heads,), 4), spec=Spec(0, 1, False)), dtype))
    y, state = fn.builder.add_multi("linear_attention", *operands, slot=slot)
    return y, state, 4.0 * states * (1 + 2 * fn.highs["S"])
