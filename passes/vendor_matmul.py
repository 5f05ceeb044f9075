"""Hands matrix products to the vendor's library, as one candidate beside the generated kernel.

    %y = matmul %x, %w : f32[B, S, N]   =>   %y = call_torch %x, %w {target = "aten.linear.default"} : f32[B, S, N]

Prologue and epilogue then become kernels of their own, so this pays only where many rows share each weight: a prompt.
Products with a weight that is a parameter are replaced; attention stays ours.
"""

from __future__ import annotations

import json

from tilewright.ir.module import Function, Module
from tilewright.ir.types import DType

from .base import PassOptions, Rewriter

TEMPLATE = json.dumps([[{"t": 0}, {"t": 1}], {}])


def vendor_matmul(module: Module, options: PassOptions) -> Module:
    """Replace products by library calls when ``options.vendor_matmul`` asks for it."""
    if not options.vendor_matmul:
        return module
    return module.with_functions(f if f.name.endswith(".weights") else _function(f) for f in module.functions)


def _function(function: Function) -> Function:
    rewriter = Rewriter(function)
    weights = {op.result for op in function.ops if op.opcode == "param"}
    for op in rewriter:
        product = op.opcode == "matmul" and op.operands[1] in weights and op.operands[1].type.rank == 2
        if not product or op.operands[0].dtype not in (DType.f32, DType.bf16):
            rewriter.keep(op)
            continue
        (result,) = rewriter.add_multi(
            "call_torch",
            *op.operands,
            types=(op.result.type,),
            target="aten.linear.default",
            template=TEMPLATE,
        )
        rewriter.replace(op.result, result)
    return rewriter.finish()
