"""Experts for many tokens: (token, chosen expert) pairs in an order by expert, and products of blocks of that order.

A pair's number is its place in ids, row-major: token * k + choice. ``experts_order`` takes ids int[..] and gives order
i32[P] and block_expert i32[N]. order has the pairs sorted by expert, equal ones in their own order, and each expert's
run padded to a multiple of ``block`` with the number of pairs, which means nobody; block_expert has the expert of each
block. P and N are what the worst ids need: N = (pairs + experts * (block - 1)) // block, P = N * block. Blocks behind
the last run hold nobody, and their expert is the number of experts.

``grouped_matmul`` takes x[R, K], order, block_expert, weights [E, M, K] (``transposed``: [E, K, M]) and, perhaps, a
bias [E, M], and gives [R * divisor, M] in x's type: row p, which stands in a block of expert e, is ``weights[e] @
x[p // divisor] + bias[e]``. So ``divisor`` is k where x has a row per token, and 1 where it has a row per pair. An
order that does not name each pair once has no meaning.

A block multiplies with one matrix, so that an expert's weights are read once for each block of its tokens and not for
every token: the form of Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022, and of the
fused experts of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from sympy import Expr, Integer
from torch import Tensor

from .errors import VerifyError
from .index import FloorDiv
from .module import Op
from .types import DType, TensorType

ORDER_ATTRS = {"experts": "int", "block": "int"}
GROUPED_ATTRS = {"block": "int", "divisor": "int", "transposed": "bool"}


def block_count(pairs: Expr, experts: int, block: int) -> Expr:
    """Blocks that the worst ids of so many pairs need."""
    return FloorDiv(sympy.expand(pairs + experts * (block - 1)), Integer(block))


def _order_types(pairs: Expr, experts: int, block: int) -> tuple[TensorType, TensorType]:
    blocks = block_count(pairs, experts, block)
    return TensorType(DType.i32, (sympy.expand(block * blocks),)), TensorType(DType.i32, (blocks,))


def infer_experts_order(op: Op) -> tuple[TensorType, ...]:
    """The types of order and block_expert. Raises VerifyError on misuse."""
    if len(op.operands) != 1:
        raise VerifyError(f"experts_order: takes 1 operand, has {len(op.operands)}")
    (ids,) = op.operands
    if not ids.dtype.is_int:
        raise VerifyError("experts_order: ids must be integer")
    if op.attr("experts") < 1 or op.attr("block") < 1:
        raise VerifyError("experts_order: experts and block must be positive")
    return _order_types(sympy.expand(ids.type.numel), op.attr("experts"), op.attr("block"))


def infer_grouped_matmul(op: Op) -> tuple[TensorType, ...]:
    """The type of the result. Raises VerifyError on misuse."""

    def need(condition: object, message: str) -> None:
        if not condition:
            raise VerifyError(f"grouped_matmul: {message}")

    need(len(op.operands) in (4, 5), f"takes 4 or 5 operands, has {len(op.operands)}")
    x, order, block_expert, weights, *bias = op.operands
    divisor, block = op.attr("divisor", 1), op.attr("block")
    need(x.type.rank == 2 and weights.type.rank == 3, "x needs rank 2 and weights rank 3")
    need(x.dtype in (DType.f32, DType.f16, DType.bf16), f"has no form in {x.dtype.value}")
    need(divisor >= 1 and block >= 1, "divisor and block must be positive")
    experts, *matrix = weights.shape
    columns, depth = matrix[::-1] if op.attr("transposed", False) else matrix
    need(all(n.is_Integer and n > 0 for n in weights.shape), "experts, M and K must be known")
    need(x.shape[1] == depth, f"K differs: {x.type} and {weights.type}")
    need(all(v.dtype == x.dtype for v in (weights, *bias)), f"weights must be {x.dtype.value}")
    need(all(v.shape == (experts, columns) for v in bias), f"the bias must be {(experts, columns)}")
    pairs = sympy.expand(x.shape[0] * divisor)
    expected = _order_types(pairs, int(experts), block)
    found = (order.type, block_expert.type)
    need(
        found == expected, f"order must be {', '.join(map(str, expected))}, not {', '.join(map(str, found))}"
    )
    return (TensorType(x.dtype, (pairs, columns)),)


def experts_order(op: Op, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the op means."""
    flat, number, block = ids.reshape(-1), op.attr("experts"), op.attr("block")
    blocks = (flat.numel() + number * (block - 1)) // block
    order = torch.full((blocks * block,), flat.numel(), dtype=torch.int32)
    block_expert = torch.full((blocks,), number, dtype=torch.int32)
    first = 0
    for expert in range(number):
        (run,) = torch.where(flat == expert)
        order[first * block : first * block + len(run)] = run
        after = first - -len(run) // block
        block_expert[first:after] = expert
        first = after
    return order, block_expert


def grouped_matmul(op: Op, operands: Sequence[Tensor]) -> Tensor:
    """What the op means; a row that the order does not name is NaN."""
    x, order, block_expert, weights, *bias = operands
    divisor = op.attr("divisor", 1)
    matrices = weights if op.attr("transposed", False) else weights.mT
    pairs = x.shape[0] * divisor
    out = x.new_full((pairs, matrices.shape[-1]), float("nan"))
    expert_of = block_expert.repeat_interleave(op.attr("block"))
    for expert in block_expert.unique().tolist():
        run = order[(expert_of == expert) & (order < pairs)].long()
        if len(run):
            rows = x[run // divisor] @ matrices[expert]
            out[run] = rows + bias[0][expert] if bias else rows
    return out
