"""Recognises attention that a model spells out, and makes it one op, whose scores are in no memory.

    %0 = matmul %q, %k : f32[B, 4, S, T]
    %1 = mul %0, 0.125                                     %b = where %hidden, -3.4e38, %bias
    %2 = add %1, %bias                                     %y = attention %q, %k, %v, %b {extras = (bias),
    %3 = where %hidden, -1e9, %2                     =>                                   scale = 0.125}
    %w = softmax(%3)     (max, sub, exp, sum, div)
    %y = matmul %w, %v : f32[B, 4, S, 64]

What lies between the products may be factors, biases, masks, casts, and views that only merge or split the dims before
the last two (a batch of heads as one dim). All biases and masks become one array: no larger than the scores that are
no longer stored. Of half types, products of operands that were widened before are products of those operands.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from sympy import Expr, Integer

from tilewright.ir.attention import LARGEST_HEAD
from tilewright.ir.index import IndexMap, index_symbols, reshape_map
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.types import DType, TensorType, Value

from .base import PassOptions, Rewriter, per_function
from .dce import eliminate_dead_code
from .spelled_attention import Finder, Lead, SpelledAttention, Step

_HALF = (DType.f16, DType.bf16)


def match_attention(module: Module, options: PassOptions) -> Module:
    """See above."""
    return eliminate_dead_code(per_function(_function)(module, options), options)


def _function(function: Function) -> Function:
    finder = Finder(function)
    rewriter = Rewriter(function)
    for op in rewriter:
        found = finder.attention(op) if op.opcode == "matmul" else None
        result = _Builder(rewriter, finder.made, found).build() if found is not None else None
        if result is None:
            rewriter.keep(op)
        else:
            rewriter.replace(op.result, result)
    return rewriter.finish()


class _Builder:
    """Writes the attention op in the place of the product with values."""

    def __init__(self, rewriter: Rewriter, made: dict[Value, Op], found: SpelledAttention) -> None:
        self.rewriter, self.made, self.found = rewriter, made, found
        leads = [found.lead, *(op.result.shape[:-2] for op in (found.scores, found.values))]
        whole = found.lead
        one = (whole[0], Integer(1)) if len(whole) == 1 else (sympy.prod(whole[:-1]), whole[-1])
        self.lead: Lead = next((lead for lead in leads if len(lead) == 2), one)

    def build(self) -> Value | None:
        """The result; None where the op does not take such operands."""
        scores, values = self.found.scores, self.found.values
        q, k, v = *scores.operands, values.operands[1]
        dtype = self._dtype(q, k, v)
        sizes = (q.shape[-1], v.shape[-2])
        if (
            dtype is None
            or not self.lead[1].is_Integer
            or any(not d.is_Integer or d > LARGEST_HEAD for d in sizes)
        ):
            return None
        q, k, v = (self._moved(self._as(x, dtype), x.shape[:-2], self.lead) for x in (q, k, v))
        scale, bias = 1.0, None
        for step in self.found.steps:
            scale *= step.factor
            bias = self._after(step, bias, dtype)
            if step.kind in ("mul", "div"):
                q = self._by_rows(step, q)
        if bias is not None:
            bias = self._expanded(bias, (*bias.shape[:3], k.shape[2]))
        out = self.rewriter.add(
            "attention", q, k, self._swapped(v), *([] if bias is None else [bias]), scale=scale, softcap=0.0, window=0,
            causal=False, slot="", extras=None if bias is None else ("bias",),
        )  # fmt: skip
        return self._as(self._moved(out, self.lead, values.result.shape[:-2]), values.result.dtype)

    def _dtype(self, q: Value, k: Value, v: Value) -> DType | None:
        """The type to compute in: a half type that q, k, v and all biases had at first, or that of the scores; None
        where a bias would have to be rounded for it."""
        terms = [s.term for s in self.found.steps if s.term is not None and s.kind in ("add", "sub")]
        first = {self._origin(x).dtype for x in (q, k, v, *terms)}
        if len(first) == 1 and first <= set(_HALF):
            return first.pop()
        return None if q.dtype in _HALF or v.dtype is DType.f64 is not q.dtype else q.dtype

    def _origin(self, value: Value) -> Value:
        """What was widened to give a value."""
        op = self.made.get(value)
        wider = (
            op is not None and op.opcode == "cast" and op.operands[0].dtype.itemsize < value.dtype.itemsize
        )
        return op.operands[0] if op is not None and wider and op.operands[0].dtype.is_float else value

    def _after(self, step: Step, bias: Value | None, dtype: DType) -> Value | None:
        """What is to be added to scores after one more step."""
        if step.term is None:
            if bias is None or step.factor == 1.0:
                return bias
            return self.rewriter.add("mul", bias, self.rewriter.const(step.factor, dtype))
        if step.kind in ("hide", "keep"):
            least = self.rewriter.const(torch.finfo(dtype.torch).min, dtype)
            other = self.rewriter.const(0.0, dtype) if bias is None else bias
            term = self._placed(step.term, step.lead)
            return self.rewriter.add(
                "where", term, *((least, other) if step.kind == "hide" else (other, least))
            )
        if step.kind in ("mul", "div"):
            return None if bias is None else self._by_rows(step, bias)
        term = self._placed(self._as(step.term, dtype), step.lead)
        if bias is None:
            return term if step.kind == "add" else self.rewriter.add("neg", term)
        return self.rewriter.add(step.kind, bias, term)

    def _by_rows(self, step: Step, x: Value) -> Value:
        """x [B, H, S, ..] with its rows multiplied or divided by a step's term, in the wider type of both."""
        assert step.term is not None
        term = self._placed(step.term, step.lead)
        wide = max(term.dtype, x.dtype, key=lambda dtype: dtype.itemsize)
        return self._as(self.rewriter.add(step.kind, self._as(x, wide), self._as(term, wide)), x.dtype)

    def _placed(self, term: Value, lead: Lead) -> Value:
        """What is added to scores with the dims ``lead`` before the last two, of rank 4, for those of the op."""
        missing = len(lead) + 2 - term.type.rank
        shape = (*(Integer(1),) * missing, *term.shape)
        term = self._view(term, shape, index_symbols(len(shape))[missing:])
        if lead == self.lead:
            return term
        if all(d == 1 for d in shape[:-2]):
            return self._view(
                term,
                (Integer(1), Integer(1), *shape[-2:]),
                (*[Integer(0)] * len(lead), *index_symbols(4)[2:]),
            )
        return self._moved(self._expanded(term, (*lead, *shape[-2:])), lead, self.lead)

    def _moved(self, x: Value, old: Lead, new: Lead) -> Value:
        """x with its dims before the last two merged and split from ``old`` to ``new``."""
        if old == new:
            return x
        shape = (*new, *x.shape[-2:])
        return self._view(x, shape, reshape_map(x.shape, shape).exprs)

    def _expanded(self, x: Value, shape: Lead) -> Value:
        exprs = [
            Integer(0) if d == 1 != n else i
            for d, n, i in zip(x.shape, shape, index_symbols(len(shape)), strict=True)
        ]
        return x if x.shape == shape else self._view(x, shape, exprs)

    def _swapped(self, x: Value) -> Value:
        b, h, s, t = index_symbols(4)
        return self._view(x, (*x.shape[:2], x.shape[3], x.shape[2]), (b, h, t, s))

    def _view(self, x: Value, shape: Lead, exprs: Sequence[Expr]) -> Value:
        if x.shape == tuple(shape) and tuple(exprs) == index_symbols(len(shape)):
            return x
        return self.rewriter.add(
            "view", x, type=TensorType(x.dtype, tuple(shape)), map=IndexMap(len(shape), tuple(exprs))
        )

    def _as(self, x: Value, dtype: DType) -> Value:
        """x in another type, from what it was widened from where that is of the type."""
        x = origin if (origin := self._origin(x)).dtype is dtype else x
        return x if x.dtype is dtype else self.rewriter.add("cast", x, type=x.type.with_dtype(dtype))
