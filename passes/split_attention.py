"""Splits decode attention over the context, so that one query's work spreads over the whole machine.

    attention(q, k, v)  =>  acc, top, total = attention_split(q, k, v) {splits = P};  merge(acc, top, total)

The merge is the flash-decoding reduction (Dao et al., "Flash-Decoding for long-context inference", 2023), written in
ordinary ops, so it fuses like any other code:

    weight = exp(top - max_p(top));  result = sum_p(weight * acc) / max(sum_p(weight * total), tiny)

On a GPU of ``options.multiprocessors``, as many chunks are made as it takes to give each of them four; an attention
with two pairs of batch row and KV head for each is left whole, as the merge would cost a launch for nothing.

Sinks enter here, as a part without values; a mask and slopes act on the scores of each part. A row without a valid
position has total 0 and gives 0. The parts are float32, so float64 attention stays whole.
"""

from __future__ import annotations

from sympy import Integer

from tilewright.ir.attention import attention_extras
from tilewright.ir.index import IndexMap, index_symbols
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.types import DType, TensorType, Value, next_power_of_two

from .base import PassOptions, Rewriter


def split_attention(module: Module, options: PassOptions) -> Module:
    """Split each attention of a single query (S fixed at 1) into up to ``options.splits`` chunks; 0 leaves it whole."""
    if not options.splits or dict(options.fixed).get("S") != 1:
        return module
    return module.with_functions(_function(f, options) for f in module.functions)


def chunks(pairs: int, most: int, multiprocessors: int) -> int:
    """Chunks of the context for so many pairs of batch row and KV head; 0 leaves it whole. ``most`` where the size of
    the machine (0) is not known."""
    if not multiprocessors:
        return most
    if pairs >= 2 * multiprocessors:
        return 0
    return min(most, next_power_of_two(-(-4 * multiprocessors // pairs)))


def _function(function: Function, options: PassOptions) -> Function:
    rewriter = Rewriter(function)
    for op in rewriter:
        splits = 0
        if op.opcode == "attention" and not op.attr("slot") and op.result.dtype is not DType.f64:
            pairs = op.operands[1].shape[0] * op.operands[1].shape[1]
            known = options.multiprocessors if pairs.is_Integer else 0
            splits = chunks(int(pairs) if known else 1, options.splits, known)
        if splits:
            rewriter.replace(op.result, _split(rewriter, op, splits))
        else:
            rewriter.keep(op)
    return rewriter.finish()


def _split(rewriter: Rewriter, op: Op, splits: int) -> Value:
    attrs = {k: v for k, v in op.attrs if k != "slot"}
    extras = attention_extras(op, op.operands)
    sinks = extras.pop("sinks", None)
    operands, attrs["extras"] = (*op.operands[:3], *extras.values()), tuple(extras) or None
    acc, top, total = rewriter.add_multi("attention_split", *operands, splits=splits, **attrs)
    add = rewriter.add
    highest = add("reduce", top, kind="max", axes=(3,), keepdim=True)
    sink: Value | None = None
    if sinks is not None:
        row = TensorType(sinks.dtype, highest.shape)
        sink = add("view", sinks, type=row, map=IndexMap(4, index_symbols(4)[1:2]))
        sink = add("cast", sink, type=highest.type)
        highest = add("maximum", highest, sink)
    weight = add("exp", add("sub", top, highest))
    index = index_symbols(5)
    column = TensorType(DType.f32, (*weight.shape, Integer(1)))
    spread = add("view", weight, type=column, map=IndexMap(5, index[:4]))
    numerator = add("reduce", add("mul", acc, spread), kind="sum", axes=(3,), keepdim=False)
    denominator = add("reduce", add("mul", total, weight), kind="sum", axes=(3,), keepdim=True)
    if sink is not None:
        denominator = add("add", denominator, add("exp", add("sub", sink, highest)))
    safe = add("maximum", denominator, rewriter.const(1e-30, DType.f32))
    return add("cast", add("div", numerator, safe), type=op.result.type)
