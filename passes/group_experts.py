"""Groups tokens by the experts that they chose, so that those of a block share what they read of an expert's weights.

    experts(x, ids, scores, gate_up, down)
    =>  order, block_expert = experts_order(ids)
        h = gate(grouped_matmul(x, order, block_expert, gate_up))
        reduce(mul(scores, grouped_matmul(h, order, block_expert, down)), sum)

For programs with many tokens: a block has rows for many, which a decode step's tokens would leave empty. It has room
for twice the tokens that an expert gets on average at the largest sizes, so that most experts' weights are read once,
within what tensor cores and registers have room for. Experts in float64, which ``grouped_matmul`` does not have, are
left to ``spell_out_experts``.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy import Integer

from tilewright.ir.index import reshape_map
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.types import DType, Value, concrete, next_power_of_two

from .base import PassOptions, Rewriter
from .spell_out_experts import Spelling

_FEWEST = 16
"""Rows that tensor cores multiply at least."""


def group_experts(module: Module, options: PassOptions) -> Module:
    """Replace experts by products of blocks of at most ``options.group_experts`` rows; 0 leaves them."""
    if not options.group_experts:
        return module
    highs = {name: high for name, _, high in module.symbols}
    return module.with_functions(_function(f, options.group_experts, highs) for f in module.functions)


def _function(function: Function, most: int, highs: Mapping[str, int]) -> Function:
    rewriter = Rewriter(function)
    for op in rewriter:
        if op.opcode == "experts" and all(v.dtype is not DType.f64 for v in op.operands):
            pairs, experts = concrete((op.operands[1].type.numel, op.operands[3].shape[0]), highs)
            block = min(most, max(_FEWEST, next_power_of_two(2 * pairs // experts)))
            rewriter.replace(op.result, _Grouping(rewriter, op, block).result())
        else:
            rewriter.keep(op)
    return rewriter.finish()


class _Grouping(Spelling):
    """The ops that one experts op stands for. Each (token, chosen expert) is a row: [pairs, K]."""

    def __init__(self, rewriter: Rewriter, op: Op, block: int) -> None:
        super().__init__(rewriter, op)
        self.block = block
        number = int(self.gate_up.shape[0])
        self.order = rewriter.add_multi("experts_order", self.ids, experts=number, block=block)
        self.tokens = self._reshaped(
            self.x, (sympy.expand(self.ids.type.numel / self.ids.shape[-1]), self.x.shape[-1])
        )

    def rows(self) -> Value:
        return self.tokens

    def product(self, rows: Value, weights: Value, bias: str) -> Value:
        """Rows of tokens or of pairs, with the chosen experts' matrices, and their bias: [pairs, m]."""
        per_row = int(self.ids.shape[-1]) if rows is self.tokens else 1
        extra = (self.extras[bias],) if bias in self.extras else ()
        return self.add(
            "grouped_matmul",
            rows,
            *self.order,
            weights,
            *extra,
            block=self.block,
            divisor=per_row if per_row > 1 else None,
            transposed=self.op.attr("transposed") or None,
        )

    def weighted(self, out: Value) -> Value:
        return super().weighted(self._reshaped(out, (*self.pairs, Integer(1), out.shape[-1])))

    def _reshaped(self, x: Value, shape: tuple[sympy.Expr, ...]) -> Value:
        return x if x.shape == shape else self.view(x, shape, reshape_map(x.shape, shape).exprs)
