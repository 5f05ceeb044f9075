"""Splits products over K where their tiles are too few to fill a GPU ("split-K").

    %y = matmul %x, %w : bf16[64, 1, 4096]                                    # K = 11008, 64 tiles of 64 columns
=>
    %1 = view %x {map = (i0, i1, i2) -> (i1, 0, 2752*i0 + i2)} : bf16[4, 64, 2752]
    %2 = view %w {map = (i0, i1, i2) -> (i1, 2752*i0 + i2)} : bf16[4, 4096, 2752]
    %3 = matmul %1, %2 {wide = 1} : f32[4, 64, 4096]
    %4 = reduce %3 {kind = "sum", axes = (0), keepdim = false} : f32[64, 4096]
    %5 = view %4 {map = (i0, i1, i2) -> (i0, i2)} : f32[64, 1, 4096]
    %y = cast %5 : bf16[64, 1, 4096]

The parts stay in float32 and are added in a fixed order, so that results do not vary from run to run; the sum fuses
with what follows (bias, residual), as the merge of split attention does. It costs a launch and the parts' way through
memory, which pays for batches from 32 on: with fewer rows, tiles of fewer columns fill the GPU.
"""

from __future__ import annotations

from sympy import Expr, Integer, prod

from tilewright.ir.index import FloorDiv, IndexMap, Mod, index_symbols
from tilewright.ir.module import Function, Module, Op
from tilewright.ir.types import DType, TensorType, Value

from .base import PassOptions, Rewriter

FEWEST_ROWS, TILE, SHORTEST = 32, 64, 2688
"""Rows of the batch from which it pays; columns of a tile; columns of K that a part has at least."""


def split_products(module: Module, options: PassOptions) -> Module:
    """Split products of a decode step for a GPU of ``options.multiprocessors``; 0 leaves them whole."""
    if not options.multiprocessors or dict(options.fixed).get("S") != 1:
        return module
    return module.with_functions(
        f if f.name.endswith(".weights") else _function(f, options.multiprocessors) for f in module.functions
    )


def parts_of(rows: int, columns: int, k: int, multiprocessors: int) -> int:
    """The largest power of two with which tiles x parts stay near two per multiprocessor; 1 for none."""
    parts = 1
    while (
        rows >= FEWEST_ROWS
        and 2 * parts * -(-columns // TILE) <= 2.5 * multiprocessors
        and k % (2 * parts * TILE) == 0
        and k // (2 * parts) >= SHORTEST
    ):
        parts *= 2
    return parts


def _function(function: Function, multiprocessors: int) -> Function:
    rewriter = Rewriter(function)
    for op in rewriter:
        parts = _parts(op, multiprocessors)
        if parts > 1:
            rewriter.replace(op.result, _split(rewriter, op, parts))
        else:
            rewriter.keep(op)
    return rewriter.finish()


def _parts(op: Op, multiprocessors: int) -> int:
    if (
        op.opcode != "matmul"
        or op.operands[1].type.rank != 2
        or op.operands[0].dtype not in (DType.bf16, DType.f16)
    ):
        return 1
    a, b = op.operands
    rows, (columns, k) = prod(a.shape[:-1], start=Integer(1)), b.shape
    if not (rows.is_Integer and columns.is_Integer and k.is_Integer):
        return 1
    return parts_of(int(rows), int(columns), int(k), multiprocessors)


def _split(rewriter: Rewriter, op: Op, parts: int) -> Value:
    a, b = op.operands
    columns, k = b.shape
    rows, part = prod(a.shape[:-1], start=Integer(1)), k / parts
    at, row, inner = index_symbols(3)
    places: list[Expr] = []
    rest: Expr = row
    for extent in reversed(a.shape[1:-1]):
        places.insert(0, Mod(rest, extent))
        rest = FloorDiv(rest, extent)
    places.insert(0, rest)

    def view(value: Value, shape: tuple[Expr, ...], index_map: IndexMap) -> Value:
        type = TensorType(value.dtype, shape)
        return rewriter.add("view", value, type=type, map=index_map)

    left = view(a, (Integer(parts), rows, part), IndexMap(3, (*places, part * at + inner)))
    right = view(b, (Integer(parts), columns, part), IndexMap(3, (row, part * at + inner)))
    product = rewriter.add("matmul", left, right, wide=1)
    total = rewriter.add("reduce", product, kind="sum", axes=(0,), keepdim=False)
    index = index_symbols(a.type.rank)
    flat: Expr = Integer(0)
    for symbol, extent in zip(index[:-1], a.shape[:-1], strict=True):
        flat = flat * extent + symbol
    shaped = view(total, op.result.shape, IndexMap(a.type.rank, (flat, index[-1])))
    return rewriter.add("cast", shaped, type=op.result.type)
