"""Keeps the logits of the last L positions only, and computes nothing for the others after the last layer.

    %n = norm(%x)          : [B, S, 64]              %t = view %x (the last L of S) : [B, L, 64]
    %l = matmul %n, %head  : [B, S, V]       =>      %l = matmul norm(%t), %head    : [B, L, V]

The slice enters at the returned logits and moves up through every op that treats positions independently.
"""

from __future__ import annotations

from tilewright.ir.index import IndexMap, index_symbols, sym
from tilewright.ir.module import Module, Op
from tilewright.ir.pointwise import POINTWISE
from tilewright.ir.types import TensorType, Value

from .base import PassOptions, Rewriter

_S, LAST = sym("S"), sym("L")
"""Positions of a sequence, and the last ones, whose logits are wanted."""


def last_tokens(module: Module, options: PassOptions) -> Module:
    """Slice the entry's first result, [B, S, V], when ``options.last_tokens`` asks for it."""
    main = module.main
    if (
        not options.last_tokens
        or not main.returns
        or main.returns[0].type.rank < 2
        or main.returns[0].shape[1] != _S
    ):
        return module
    rewriter = Rewriter(main)
    rewriter.ops = list(main.ops)
    sliced = _slice(main.returns[0], rewriter, main.definitions(), {})
    function = main.with_ops(rewriter.ops, (sliced, *main.returns[1:]))
    span = next((low, high) for name, low, high in module.symbols if name == "S")
    functions = (function if f.name == main.name else f for f in module.functions)
    return module.with_functions(functions).with_symbols(L=(1, span[1]))


def _slice(value: Value, rewriter: Rewriter, made: dict[Value, Op], done: dict[Value, Value]) -> Value:
    """``value`` [.., S at axis 1, ..] reduced to its last L positions."""
    if value in done:
        return done[value]
    op = made.get(value)
    if op is None or not _row_wise(op):
        index = list(index_symbols(value.type.rank))
        index[1] = index[1] + _S - LAST
        type = _shorter(value.type)
        new = rewriter.add("view", value, type=type, map=IndexMap(value.type.rank, tuple(index)))
    else:
        rank = op.operands[0].type.rank if op.opcode == "reduce" else value.type.rank
        operands = [_slice(v, rewriter, made, done) if _has_rows(v, rank) else v for v in op.operands]
        new = rewriter.add(op.opcode, *operands, loc=op.loc, type=_shorter(op.result.type), **dict(op.attrs))
    done[value] = new
    return new


def _shorter(type: TensorType) -> TensorType:
    return TensorType(type.dtype, (type.shape[0], LAST, *type.shape[2:]))


def _has_rows(value: Value, rank: int) -> bool:
    """True for an operand that carries S at axis 1 of the result."""
    return value.type.rank == rank and value.shape[1] == _S


def _row_wise(op: Op) -> bool:
    if op.opcode in POINTWISE:
        rank = op.result.type.rank
        return all(_has_rows(v, rank) or _S not in _symbols(v) for v in op.operands)
    if op.opcode == "reduce":
        return 1 not in op.attr("axes") and 0 not in op.attr("axes") and op.operands[0].shape[1] == _S
    if op.opcode == "matmul":
        return op.operands[0].type.rank == 3 and op.operands[1].type.rank == 2
    return False


def _symbols(value: Value) -> set[object]:
    return {s for d in value.shape for s in d.free_symbols}
