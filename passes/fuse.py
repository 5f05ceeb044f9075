"""Fuses ops into kernels by one rule: a kernel is legal when its loop form is, and good when it stores fewer bytes.

    %h = mul %x, %w                              %k = kernel %x, %w, %m, %r [
    %y = matmul %h, %m                =>           %h = mul %x, %w
    %o = add %y, %r                                %y = matmul %h, %m
                                                   %o = add %y, %r ] {name = "main_0_matmul"}

Three steps, none of which knows a model:
1. *Epilogues*: from each anchor (matmul, attention) downwards, as long as every segment stays a matrix product (or the
   attention's results pass through views only) and the bytes that escape do not grow. Experts and recurrent
   layers stay by themselves.
2. *Prologues*: upwards from each matmul, ops whose every use lies in such kernels; they are recomputed there, so only
   cheap ones, or those with one value per row; with ``plain_rows`` only what makes the weights, views, and rows of
   codes, and with ``plain_weights`` no codes of weights.
3. *Loops*: what is left, bottom-up: an op joins the kernel of its consumers when they are one kernel, and does not
   then compute a reduction anew for each element or inside another one, nor, of what is rounded, one of each element.

Before that, views, casts, constants and quantised weights as floats, which cost little inside a kernel and much in
memory, are copied so that each has one user.

``scalarize`` decides legality; see ``ir.loops``.
"""

from __future__ import annotations

from dataclasses import replace

from tilewright.ir.index import IndexMap, index_symbols
from tilewright.ir.loops import PRIMITIVES
from tilewright.ir.module import Function, Module, Names, Op, make_attrs
from tilewright.ir.types import Value

from .base import PassOptions
from .fusion.emit import emit
from .fusion.epilogues import grow_epilogue
from .fusion.groups import ANCHORS, SOURCES, Groups
from .fusion.loops import group_loops
from .fusion.prologues import grow_prologue

_FREE = (*SOURCES, "view", "cast", "dequantize")
_READS_MEMORY = ("call", "call_torch", *PRIMITIVES)  # what these read is stored once, however many they are


def fuse(module: Module, options: PassOptions) -> Module:
    """Replace every computing op by kernels; params, calls and PyTorch calls stay."""
    highs = {name: high for name, _, high in module.symbols}
    return module.with_functions(
        f if f.name.endswith(".weights") else _fuse_function(f, highs, options) for f in module.functions
    )


def _copy_returns(function: Function) -> Function:
    """Return each value from memory of its own: parameters, weights and values returned twice are copied."""
    names = Names.of(function)
    made = function.definitions()
    copies: list[Op] = []
    returns: list[Value] = []
    for value in function.returns:
        if value in returns or value not in made or made[value].opcode in ("param", "append"):
            index_map = IndexMap(value.type.rank, index_symbols(value.type.rank))
            copy = Value(names.fresh(), value.type)
            copies.append(Op("view", (value,), make_attrs({"map": index_map}), (copy,)))
            value = copy
        returns.append(value)
    return function.with_ops((*function.ops, *copies), returns)


def _copy_free_ops(function: Function) -> Function:
    """Give every use of a view, cast or constant inside a kernel its own copy."""
    names = Names.of(function)
    made = function.definitions()
    used: set[Value] = set(function.returns)
    # A constant that is read from memory gets a kernel that stores it, so none of the others may hold it.
    used.update(
        v
        for op in function.ops
        if op.opcode in _READS_MEMORY
        for v in op.operands
        if v in made and made[v].opcode in SOURCES
    )
    out: list[Op] = []

    def copy(value: Value, before: list[Op]) -> Value:
        """``value`` for one more use: itself the first time, else a copy, whose op is added to those ``before`` it."""
        op = made.get(value)
        if op is None or op.opcode not in _FREE or value not in used:
            used.add(value)
            return value
        new = Value(names.fresh(), value.type)
        before.append(replace(op, operands=tuple(copy(v, before) for v in op.operands), results=(new,)))
        return new

    for op in function.ops:
        if op.opcode in _READS_MEMORY:
            used.update(op.operands)
            out.append(op)
            continue
        before: list[Op] = []
        table = {v: copy(v, before) for v in dict.fromkeys(op.operands)}
        out += [*before, op.with_operands(table)]
    return function.with_ops(out)


def _fuse_function(function: Function, highs: dict[str, int], options: PassOptions) -> Function:
    groups = Groups(_copy_free_ops(_copy_returns(function)), highs)
    for n, op in enumerate(groups.ops):
        if op.opcode in ANCHORS:
            groups.start({n}, anchored=True)
    for anchor in sorted(groups.anchored):
        grow_epilogue(groups, anchor)
    for anchor in sorted(groups.anchored):
        grow_prologue(groups, anchor, options)
    group_loops(groups)
    return emit(groups)
