"""Attention: what the op means beside softmax(q k^T) v, and the types of its operands and results.

``attention`` with a non-empty ``slot`` owns the append of k and v to that slot of the request's KV state;
with slot "" it attends over exactly the given k and v, whose length may exceed q's (q is then the last S of T), and
whose type may be narrower than q's (``STORED_AS``).
Scores are scaled, capped, biased, then masked: keys that come after their query, if ``causal``, keys ``window`` or more
positions before it (0: no bound), and keys ``ahead`` or more positions after it. ``extras`` names the operands that
follow v, in the order of ``ATTENTION_EXTRAS``:

- mask bool[B, T]: the keys that may be attended to
- sinks [H], of q's dtype: a score of each head that takes its share of the softmax and has no value (Xiao et al.,
  "Efficient Streaming Language Models with Attention Sinks", 2023, in the learned form of gpt-oss)
- slopes f32[H]: ``slopes[h] * (key - query)``, of the positions in the context, is added to each score (ALiBi: Press
  et al., "Train Short, Test Long", 2022)
- distances f32[H, R], R odd: ``distances[h, R // 2 + key - query]`` is added to each score, or the first or last of
  them beyond either end (T5's relative positions: Raffel et al., "Exploring the Limits of Transfer Learning", 2020)
- bias [B or 1, H or 1, S or 1, T], of q's dtype: an array that is added to the scores, which then are no less than
  ``LEAST_BIASED``; minus infinity masks
- reach i64[B, S], with ``causal``: the last key of the context that each query sees, in place of its own; not less than
  that, nor less than the query's before (of tokens of an image, the image's last one, in Gemma 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import sympy

from .checks import arity, need
from .index import sym
from .module import Op
from .types import DType, TensorType, Value

T = TypeVar("T")

MASKED = -1e30
"""Score of a masked position: finite, so that a row without any valid position gives zero rather than NaN."""
LEAST_BIASED = -1e29
"""The least score that a finite number of an array of biases leaves. (Keys that all have the least number of a type
added share a row's weights evenly, in PyTorch too.)"""
LARGEST_HEAD = 256
"""The most numbers of a head, of keys or of values, for which what models spell out is made one op: kernels hold those
of several rows side by side."""
ATTENTION_ATTRS = {
    "scale": "float", "causal": "bool", "window": "int", "softcap": "float", "ahead": "int", "extras": "names",
}  # fmt: skip
ATTENTION_OPTIONAL = frozenset({"ahead", "extras"})
ATTENTION_EXTRAS = ("mask", "sinks", "slopes", "distances", "bias", "reach")
STORED_AS = {
    DType.f32: (DType.bf16, DType.f16, DType.f8), DType.bf16: (DType.f8,), DType.f16: (DType.f8,),
}  # fmt: skip
"""Narrower types in which k and v of an attention may be stored, by q's type."""


def _operands(op: Op) -> tuple[Value, Value, Value]:
    extras = op.attr("extras", ())
    arity(op, 3 + len(extras))
    q, k, v = op.operands[:3]
    need(q.type.rank == k.type.rank == v.type.rank == 4, op, "q, k and v need rank 4")
    need(
        k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0], op, f"k and v do not fit: {k.type}, {v.type}"
    )
    need(q.shape[3] == k.shape[3], op, "q and k differ in head size")
    need(
        k.dtype == v.dtype and (k.dtype == q.dtype or k.dtype in STORED_AS.get(q.dtype, ())),
        op,
        f"k and v cannot be {k.dtype.value}, {v.dtype.value} for q in {q.dtype.value}",
    )
    heads, groups = q.shape[1], k.shape[1]
    need(
        heads.is_Integer and groups.is_Integer and heads % groups == 0,
        op,
        "query heads must be a multiple of KV heads",
    )
    need(
        op.attr("slot", "") == "" or q.shape[2] == k.shape[2],
        op,
        "with a slot, k and v are the new tokens only",
    )
    known = tuple(name for name in ATTENTION_EXTRAS if name in extras)
    need(extras == known, op, f"extras are some of {', '.join(ATTENTION_EXTRAS)}, in that order")
    need(op.attr("extras") != (), op, "extras are left out where there are none")
    context = sym("T") if op.attr("slot", "") else k.shape[2]
    types = {
        "mask": TensorType(DType.bool, (q.shape[0], context)),
        "sinks": TensorType(q.dtype, (heads,)),
        "slopes": TensorType(DType.f32, (heads,)),
        "reach": TensorType(DType.i64, (q.shape[0], q.shape[2])),
    }
    given = attention_extras(op, op.operands)
    if (table := given.get("distances")) is not None:
        odd = table.type.rank == 2 and table.shape[1].is_Integer and table.shape[1] % 2 == 1
        need(odd, op, f"distances need an odd number of columns, not {table.type}")
        types["distances"] = TensorType(DType.f32, (heads, table.shape[1]))
    if (bias := given.get("bias")) is not None:
        whole = (*q.shape[:3], context)
        ranks = bias.type.rank == 4 and all(d in (1, n) for d, n in zip(bias.shape[:3], whole, strict=False))
        types["bias"] = TensorType(q.dtype, (*bias.shape[:3], context) if ranks else whole)
    for name, value in given.items():
        need(value.type == types[name], op, f"{name} must be {types[name]}, not {value.type}")
    need("reach" not in given or op.attr("causal"), op, "reach is for causal attention")
    need(op.attr("ahead") != 0, op, "ahead is left out where it bounds nothing")
    need(not (op.attr("ahead") and op.attr("causal")), op, "causal attention looks at nothing ahead")
    return q, k, v


def attention_extras(op: Op, operands: Sequence[T]) -> dict[str, T]:
    """What an attention has beside q, k and v, by name. ``operands``: its own, or what stands for each of them."""
    return dict(zip(op.attr("extras", ()), operands[3:], strict=True))


def infer_attention(op: Op) -> tuple[TensorType, ...]:
    """The result of an attention. Raises VerifyError on misuse."""
    q, _, v = _operands(op)
    return (TensorType(q.dtype, (*q.shape[:3], v.shape[3])),)


def infer_append(op: Op) -> tuple[TensorType, ...]:
    """The slot's whole cache after an append. Raises VerifyError on misuse."""
    arity(op, 1)
    (x,) = op.operands
    need(x.type.rank == 4, op, "needs rank 4: [B, G, S, D]")
    return (TensorType(x.dtype, (x.shape[0], x.shape[1], sym("T"), x.shape[3])),)


def infer_attention_split(op: Op) -> tuple[TensorType, ...]:
    """The parts of a split attention. Raises VerifyError on misuse."""
    q, _, v = _operands(op)
    need(q.dtype is not DType.f64, op, "its parts are f32; f64 is not split")
    need("sinks" not in op.attr("extras", ()), op, "sinks belong to the merge of its parts")
    partial = (*q.shape[:3], sympy.Integer(op.attr("splits")))
    row = TensorType(DType.f32, partial)
    return TensorType(DType.f32, (*partial, v.shape[3])), row, row
