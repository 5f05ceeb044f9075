"""Keeps keys and values in a narrower type: half or a quarter of the bytes that a decode step reads of its context.

    %1 = append %k {slot = "k"} : f32[B, 4, T, 64]
    %2 = append %v {slot = "v"} : f32[B, 4, T, 64]
    %y = attention %q, %1, %2 {slot = ""} : f32[B, 8, S, 64]
=> for f8
    %3 = cast %k : f8[B, 4, S, 64]
    %1 = append %3 {slot = "k"} : f8[B, 4, T, 64]
    ... the same of %v ...
    %y = attention %q, %1, %2 {slot = ""} : f32[B, 8, S, 64]

f8 has no scale: its relative precision is the same from 2^-6 to 448, which keys and values do not leave; what is larger
becomes 448. (As vLLM and TensorRT-LLM keep it where no scale was calibrated.)
"""

from __future__ import annotations

from collections import Counter

from tilewright.ir.attention import STORED_AS
from tilewright.ir.module import Function, Module, Op, walk
from tilewright.ir.types import DType, Value

from .base import PassOptions, Rewriter


def narrow_cache(module: Module, options: PassOptions) -> Module:
    """Store what attentions append as ``options.kv_cache``; after ``expose_append``."""
    if not options.kv_cache:
        return module
    dtype = DType(options.kv_cache)
    return module.with_functions(_function(f, dtype) for f in module.functions)


def kept_wide(module: Module, options: PassOptions) -> tuple[str, ...]:
    """What a person wants to know of keys and values that stay as they were, a line for each type of theirs."""
    if not options.kv_cache:
        return ()
    ops = (op for f in module.functions for op in walk(f.ops))
    stored = Counter(op.result.dtype.value for op in ops if op.opcode == "append")
    return tuple(
        f"keys and values stay {dtype} (distinct layers: {count // 2}): something besides attention reads them"
        for dtype, count in stored.items()
        if dtype != DType(options.kv_cache).value
    )


def _function(function: Function, dtype: DType) -> Function:
    appended = {op.result for op in function.ops if op.opcode == "append"}
    if not all(_only_attends(op, appended, dtype) for op in function.ops) or appended & set(function.returns):
        return function
    rewriter = Rewriter(function)
    for op in rewriter:
        if op.opcode != "append":
            rewriter.keep(op)
            continue
        (new,) = op.operands
        narrow = rewriter.add("cast", new, type=new.type.with_dtype(dtype))
        rewriter.replace(op.result, rewriter.add("append", narrow, slot=str(op.attr("slot"))))
    return rewriter.finish()


def _only_attends(op: Op, appended: set[Value], dtype: DType) -> bool:
    """True for an op that reads what was appended as keys and values alone, which may be in ``dtype``."""
    if op.opcode != "attention":
        return not appended & set(op.operands)
    q, k, v, *others = op.operands
    read = appended & {k, v}
    return not appended & {q, *others} and (
        not read or (read == {k, v} and dtype in STORED_AS.get(q.dtype, ()))
    )
