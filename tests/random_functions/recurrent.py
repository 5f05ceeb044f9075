"""Recurrent layers: moves whose results depend on what a request remembers."""

from __future__ import annotations

from sympy import Integer

from tilewright.ir.index import sym
from tilewright.ir.recurrent import wide
from tilewright.ir.types import TensorType, Value

from .draft import RandomFunction, Spec
from .products import project


def recurrent(fn: RandomFunction) -> Value | None:
    """A convolution over the last tokens, or a scan whose state decays, of [B, S, C]."""
    x = fn.floats(
        lambda v: v.type.rank == 3 and v.shape[:2] == (sym("B"), sym("S")) and v.shape[2].is_Integer
    )
    if x is None:
        return None
    x, slot = fn.bounded(x, 4), f"recurrent{len(fn.slots)}"
    if fn.number(0, 1):
        taps = Integer(fn.number(2, 4))
        operands = [x, fn.weight(TensorType(x.dtype, (taps, x.shape[2])))]
        operands += [fn.weight(TensorType(x.dtype, x.shape[2:]))] if fn.number(0, 1) else []
        y, state = fn.builder.add_multi("causal_conv1d", *operands, slot=slot)
        size = 4.0 * int(taps) + 1
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
