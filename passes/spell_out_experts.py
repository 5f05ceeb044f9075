"""Spells experts out in ordinary ops, for a backend that has no kernel of its own for them.

    experts(x, ids, scores, gate_up, down)
    =>  h = gate(matmul(x, gather(gate_up, ids)));  reduce(mul(scores, matmul(h, gather(down, ids))), sum)

The gathers fuse into the products, which then read the rows of chosen experts from the stacked weights: nothing is
copied. A token reads the weights of its experts for itself, which suits a decode step; so that tokens of a prompt which
share an expert share what they read, there is ``group_experts``. float64 is always spelled out.
"""

from __future__ import annotations

from sympy import Expr, Integer

from tilewright.ir.experts import Gate, experts_extras
from tilewright.ir.index import IndexMap, index_symbols
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.types import DType, TensorType, Value

from .base import PassOptions, Rewriter


def spell_out_experts(module: Module, options: PassOptions) -> Module:
    """Replace experts with ``options.spell_out_experts``, and those in float64."""
    return module.with_functions(_function(f, options.spell_out_experts) for f in module.functions)


def _function(function: Function, always: bool) -> Function:
    rewriter = Rewriter(function)
    for op in rewriter:
        wide = any(v.dtype is DType.f64 for v in op.operands)
        if op.opcode == "experts" and (always or wide):
            rewriter.replace(op.result, Spelling(rewriter, op).result())
        else:
            rewriter.keep(op)
    return rewriter.finish()


class Spelling:
    """The ops that one experts op stands for. Each (token, chosen expert) is a product of one row: [.., k, 1, K]."""

    def __init__(self, rewriter: Rewriter, op: Op) -> None:
        self.rewriter, self.op, self.gate = rewriter, op, Gate.of(op)
        self.add = rewriter.add
        self.x, self.ids, self.scores, self.gate_up, self.down = op.operands[:5]
        self.extras = experts_extras(op, op.operands)
        self.pairs = self.ids.shape
        self.lead = index_symbols(len(self.pairs) + 2)[: len(self.pairs)]

    def result(self) -> Value:
        """The experts' result in ordinary ops."""
        hidden = self.product(self.rows(), self.gate_up, "gate_up_bias")
        return self.weighted(self.product(self.gated(hidden), self.down, "down_bias"))

    def rows(self) -> Value:
        """What the first product multiplies: [.., k, 1, K]."""
        shape = (*self.pairs, Integer(1), self.x.shape[-1])
        return self.view(self.x, shape, (*self.lead[:-1], index_symbols(len(shape))[-1]))

    def weighted(self, out: Value) -> Value:
        """[.., k, 1, K] -> [.., K], the sum of what the chosen experts say, each times its score."""
        wide = DType.f64 if self.x.dtype is DType.f64 else DType.f32
        scores = self.cast(self.view(self.scores, (*self.pairs, Integer(1), Integer(1)), self.lead), wide)
        weighted = self.add("mul", self.cast(out, wide), scores)
        axes = (len(self.pairs) - 1, len(self.pairs))
        total = self.add("reduce", weighted, kind="sum", axes=axes, keepdim=False)
        return self.cast(total, self.x.dtype)

    def product(self, rows: Value, weights: Value, bias: str) -> Value:
        """[.., k, 1, n] with the chosen experts' matrices, and their bias: [.., k, 1, m]."""
        if self.op.attr("transposed", False):
            a, b, c = index_symbols(3)
            n, depth, columns = weights.shape
            weights = self.view(weights, (n, columns, depth), (a, c, b))
        out = self.add("matmul", rows, self.add("gather", weights, self.ids, axis=0))
        if bias not in self.extras:
            return out
        chosen = self.add("gather", self.extras[bias], self.ids, axis=0)
        column = index_symbols(out.type.rank)[-1]
        return self.add("add", out, self.view(chosen, out.shape, (*self.lead, column)))

    def gated(self, hidden: Value) -> Value:
        """[.., 2I] -> [.., I]."""
        gate, up = self.halves(hidden)
        if limit := self.gate.limit:
            gate = self.add("minimum", gate, self.number(limit, gate))
            up = self.add("maximum", up, self.number(-limit, up))
            up = self.add("minimum", up, self.number(limit, up))
        if self.gate.offset:
            up = self.add("add", up, self.number(self.gate.offset, up))
        return self.add("mul", self.activated(gate), up)

    def halves(self, hidden: Value) -> tuple[Value, Value]:
        """Gates and ups [.., I] of [.., 2I]."""
        *lead, last = index_symbols(hidden.type.rank)
        inner = hidden.shape[-1] / 2
        starts = (2 * last, 2 * last + 1) if self.gate.interleaved else (last, last + inner)
        shape = (*hidden.shape[:-1], inner)
        first, second = (self.view(hidden, shape, (*lead, start)) for start in starts)
        return first, second

    def activated(self, x: Value) -> Value:
        match self.gate.activation:
            case "relu":
                return self.add("maximum", x, self.number(0.0, x))
            case "gelu":
                inner = self.add("erf", self.times(x, 0.5**0.5))
                return self.times(self.add("mul", x, self.plus(inner, 1.0)), 0.5)
            case "gelu_tanh":
                cube = self.add("mul", self.add("mul", x, x), x)
                scaled = self.times(self.add("add", x, self.times(cube, 0.044715)), 0.7978845608028654)
                return self.times(self.add("mul", x, self.plus(self.add("tanh", scaled), 1.0)), 0.5)
        scaled = x if self.gate.alpha == 1.0 else self.times(x, self.gate.alpha)
        return self.add("mul", x, self.add("sigmoid", scaled))

    # -- ops ---------------------------------------------------------------------------------------------------

    def number(self, value: float, like: Value) -> Value:
        return self.rewriter.const(value, like.dtype)

    def times(self, x: Value, factor: float) -> Value:
        return self.add("mul", x, self.number(factor, x))

    def plus(self, x: Value, term: float) -> Value:
        return self.add("add", x, self.number(term, x))

    def cast(self, x: Value, dtype: DType) -> Value:
        return x if x.dtype is dtype else self.add("cast", x, type=x.type.with_dtype(dtype))

    def view(self, x: Value, shape: tuple[Expr, ...], exprs: tuple[Expr, ...]) -> Value:
        return self.add(
            "view", x, type=TensorType(x.dtype, tuple(shape)), map=IndexMap(len(shape), tuple(exprs))
        )
