"""Recurrent layers: the opaque ops of capture are the IR's own, less the state, which is named by its slot here."""

from __future__ import annotations

from tilewright.ir.index import sym
from tilewright.ir.recurrent import wide
from tilewright.ir.types import Value

from .aten_rules import Context


def opaque_recurrent(ctx: Context, opcode: str, x: Value, *operands: Value | None) -> Value:
    """``tilewright::causal_conv1d``, ``selective_scan`` and ``linear_attention``; ``ctx.slot`` names the state."""
    given = [v for v in operands if v is not None]
    if opcode == "selective_scan":
        dt, decay, *ends = given
        given = [ctx.cast(dt, x.dtype), ctx.cast(decay, wide(x.dtype)), *(ctx.cast(v, x.dtype) for v in ends)]
    elif opcode == "linear_attention":
        k, v, *rates = given
        dtype = wide(v.dtype)
        x, given = ctx.cast(x, dtype), [ctx.cast(k, dtype), v, *(ctx.cast(r, dtype) for r in rates)]
    else:
        given = [ctx.cast(v, x.dtype) for v in given]
    result, _ = ctx.builder.add_multi(opcode, x, *given, slot=ctx.slot)
    return result


def opaque_new_tokens(ctx: Context, mask: Value, x: Value) -> Value:
    """``tilewright::new_tokens``: the last S columns of mask[B, T], where x is [B, S, ..]."""
    new = x.shape[1]
    return ctx.narrow(mask, 1, sym("T") - new, new)
