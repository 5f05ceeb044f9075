"""Hand-built kernels of recurrent layers, for the list in ``triton_cases``: sizes that blocks of channels find hard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewright.ir.builder import Builder
from tilewright.ir.recurrent import wide
from tilewright.ir.types import DType, tensor_type

from .kernel_case import Case, case, finish


def sizes_of(rows: str) -> tuple[list[Any], dict[str, int]]:
    """Dims of x but channels: a prompt of some sequences, or a step of one, of four, or of a batch not known before."""
    return {
        "many": (["B", "S"], {"B": 3, "S": 7}),
        "step": (["B", 1], {"B": 2}),
        "one": ([1, 1], {}),
        "four": ([4, 1], {}),
    }[rows]


@case(
    "causal_conv1d",
    *((dtype, rows, 96, 4) for dtype in (DType.f32, DType.bf16) for rows in ("many", "one", "four")),
    (DType.f16, "many", 64, 4), (DType.f64, "many", 70, 3), (DType.f32, "many", 130, 2), (DType.f32, "step", 5, 9),
)  # fmt: skip
def causal_conv1d(dtype: DType, rows: str, channels: int, taps: int) -> Case:
    """With a bias where the number of taps is even; fewer tokens than taps, and more; few channels, and a last block
    that is not whole."""
    lead, dims = sizes_of(rows)
    b = Builder()
    operands = [
        b.param_value("x", tensor_type(dtype, [*lead, channels])),
        b.param_value("w", tensor_type(dtype, [taps, channels])),
    ]
    if taps % 2 == 0:
        operands.append(b.param_value("bias", tensor_type(dtype, [channels])))
    return finish(b, *b.add_multi("causal_conv1d", *operands, slot="conv"), **dims)


@case(
    "selective_scan",
    *((dtype, rows, 96, 16) for dtype in (DType.f32, DType.bf16) for rows in ("many", "one", "four")),
    (DType.f16, "many", 64, 8), (DType.f64, "many", 70, 3), (DType.f32, "many", 130, 1), (DType.f32, "step", 5, 20),
)  # fmt: skip
def selective_scan(dtype: DType, rows: str, channels: int, states: int) -> Case:
    """Time steps from next to nothing, which keeps the state, to some, which forgets it."""
    lead, dims = sizes_of(rows)
    b = Builder()
    x, dt = (b.param_value(n, tensor_type(dtype, [*lead, channels])) for n in ("x", "dt"))
    decay = b.param_value("decay", tensor_type(wide(dtype), [states, channels]))
    ends = [b.param_value(n, tensor_type(dtype, [*lead, states])) for n in ("into", "out_of")]
    made = finish(b, *b.add_multi("selective_scan", x, dt, decay, *ends, slot="scan"), **dims)
    return Case(made.module, made.dims, {"dt": _steps(made), "decay": _decay(states, channels, wide(dtype))})


@case(
    "linear_attention",
    *((dtype, rows, "delta", 1, 2, 4, 16, 32) for dtype in (DType.f32, DType.bf16) for rows in ("many", "one", "four")),
    (DType.f32, "many", "plain", 1, 4, 4, 8, 70), (DType.f16, "many", "delta", 12, 1, 3, 12, 16),
    (DType.f64, "many", "delta", 1, 1, 2, 5, 7), (DType.bf16, "step", "plain", 16, 1, 2, 16, 130),
    (DType.f32, "one", "delta", 1, 1, 1, 1, 1),
)  # fmt: skip
def linear_attention(
    dtype: DType, rows: str, rule: str, rates: int, groups: int, heads: int, size: int, depth: int
) -> Case:
    """Groups of heads, heads of several blocks and of odd sizes; one decay, or one for each row of the state."""
    lead, dims = sizes_of(rows)
    b = Builder()
    q, k = (b.param_value(n, tensor_type(wide(dtype), [*lead, groups, size])) for n in ("q", "k"))
    v = b.param_value("v", tensor_type(dtype, [*lead, heads, depth]))
    operands = [q, k, v, b.param_value("decay", tensor_type(wide(dtype), [*lead, heads, rates]))]
    if rule == "delta":
        operands.append(b.param_value("beta", tensor_type(wide(dtype), [*lead, heads])))
    made = finish(b, *b.add_multi("linear_attention", *operands, slot="memory"), **dims)
    given = made.inputs()
    drawn = {"decay": -torch.nn.functional.softplus(2 * given["decay"])}
    if rule == "delta":  # as in models: keys of length 1, so that what is taken away is what was there
        drawn |= {
            "k": torch.nn.functional.normalize(given["k"], dim=-1),
            "beta": torch.sigmoid(given["beta"]),
        }
    return Case(made.module, made.dims, drawn)


def _steps(made: Case) -> Tensor:
    return 3 * torch.sigmoid(2 * made.inputs()["dt"].double() - 2).to(made.inputs()["dt"].dtype)


def _decay(states: int, channels: int, dtype: DType) -> Tensor:
    drawn = torch.rand(states, channels, generator=torch.Generator().manual_seed(1))
    return -(drawn + torch.arange(states)[:, None]).to(dtype.torch)
