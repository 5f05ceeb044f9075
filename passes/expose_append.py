"""Makes the cache append an op of its own, so that it can become the epilogue of the matmul that computes k and v.

attention(q, k, v) {slot}  =>  attention(q, append(k) {slot.k}, append(v) {slot.v}) {slot = ""}
"""

from __future__ import annotations

from tilewright.ir.module import Function

from .base import Rewriter, per_function


def _function(function: Function) -> Function:
    rewriter = Rewriter(function)
    for op in rewriter:
        if op.opcode != "attention" or not op.attr("slot"):
            rewriter.keep(op)
            continue
        q, k, v, *others = op.operands
        keys = rewriter.add("append", k, slot=f"{op.attr('slot')}.k")
        values = rewriter.add("append", v, slot=f"{op.attr('slot')}.v")
        attrs = dict(op.attrs) | {"slot": ""}
        rewriter.replace(op.result, rewriter.add("attention", q, keys, values, *others, **attrs))
    return rewriter.finish()


expose_append = per_function(_function)
