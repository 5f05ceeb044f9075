"""Removes ops whose results nobody uses. ``append`` and recurrent layers stay: they change the request's state.

%1 = neg %x : f32[4]
%2 = exp %x : f32[4]          =>          %2 = exp %x : f32[4]
return %2
"""

from __future__ import annotations

import torch

from tilewright.ir.module import Function, Module, Op
from tilewright.ir.recurrent import RECURRENT
from tilewright.ir.reference import torch_op
from tilewright.ir.types import Value

from .base import PassOptions


def eliminate_dead_code(module: Module, options: PassOptions) -> Module:
    """Drop unused ops, then functions that are never called (those preparing weights stay with their function)."""
    functions = [_function(f) for f in module.functions]
    called = {op.attr("callee") for f in functions for op in f.ops if op.opcode == "call"} | {module.entry}
    kept = (f for f in functions if f.name in called or f.name.removesuffix(".weights") in called)
    return module.with_functions(kept)


def has_effect(op: Op) -> bool:
    """True when the op does more than compute its results."""
    if op.opcode in RECURRENT:
        return True
    match op.opcode:
        case "append" | "call":
            return True
        case "attention":
            return bool(op.attr("slot"))
        case "call_torch":
            target = torch_op(op.attr("target"))
            mutates = target._schema.is_mutable
            return bool(mutates or torch.Tag.nondeterministic_seeded in target.tags)
        case "kernel":
            return any(has_effect(o) for o in op.body)
    return False


def _function(function: Function) -> Function:
    live: set[Value] = set(function.returns)
    kept: list[Op] = []
    for op in reversed(function.ops):
        if has_effect(op) or live & set(op.results):
            kept.append(op)
            live |= set(op.operands)
    return function.with_ops(reversed(kept))
