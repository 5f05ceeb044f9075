"""Layers of experts of sizes that kernels find hard, each with inputs and the module around its one op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tilewright.ir.builder import Builder
from tilewright.ir.module import Function, Module
from tilewright.ir.types import DType, TensorType, tensor_type


@dataclass(frozen=True)
class ExpertsCase:
    """Sizes and attributes of an op; ``ids`` i64[tokens, chosen], drawn where there are none, may repeat."""

    tokens: int
    chosen: int
    experts: int
    depth: int
    inner: int
    dtype: DType = DType.f32
    scores: DType = DType.f32
    attrs: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[tuple[int, ...], ...] = ()

    def types(self) -> dict[str, TensorType]:
        """The op's operands, in order."""
        up, down = (2 * self.inner, self.depth), (self.depth, self.inner)
        if self.attrs.get("transposed"):
            up, down = up[::-1], down[::-1]
        types = {
            "x": (self.dtype, ["B", self.depth]),
            "ids": (DType.i64, ["B", self.chosen]),
            "scores": (self.scores, ["B", self.chosen]),
            "gate_up": (self.dtype, [self.experts, *up]),
            "down": (self.dtype, [self.experts, *down]),
            "gate_up_bias": (self.dtype, [self.experts, 2 * self.inner]),
            "down_bias": (self.dtype, [self.experts, self.depth]),
        }
        left_out = {"gate_up_bias", "down_bias"} - set(self.attrs.get("extras", ()))
        return {name: tensor_type(*t) for name, t in types.items() if name not in left_out}

    def module(self) -> Module:
        b = Builder()
        operands = [b.param_value(name, type) for name, type in self.types().items()]
        y = b.add("experts", *operands, **{"activation": "silu", **self.attrs})
        return Module((Function("main", tuple(b.params), tuple(b.ops), (y,)),), (("B", 1, self.tokens),))

    def inputs(self) -> dict[str, Tensor]:
        """A tensor for every operand, the same at each call; with three deviations a limit of 2 is passed often."""
        generator = torch.Generator().manual_seed(3)
        found = {}
        for name, type in self.types().items():
            shape = [self.tokens if d.free_symbols else int(d) for d in type.shape]
            scale = 3 / shape[-1] ** 0.5 if name in ("gate_up", "down") else 1.0
            found[name] = (scale * torch.randn(shape, generator=generator)).to(type.dtype.torch)
        order = torch.rand(self.tokens, self.experts, generator=generator).argsort(-1)
        found["ids"] = torch.tensor(self.ids) if self.ids else order[:, : self.chosen].contiguous()
        return found


CLAMPED = {"alpha": 1.702, "limit": 2.0, "offset": 1.0, "interleaved": True}
BIASED = {"extras": ("gate_up_bias", "down_bias")}

CASES = {
    "one token": ExpertsCase(1, 2, 4, 64, 32),
    "one expert a token": ExpertsCase(5, 1, 3, 40, 24),
    "every expert": ExpertsCase(3, 4, 4, 48, 20),
    "one expert of all": ExpertsCase(6, 1, 1, 32, 16),
    "odd sizes": ExpertsCase(3, 2, 5, 37, 13),
    "single columns": ExpertsCase(2, 2, 3, 1, 1),
    "nobody chose the first and the last": ExpertsCase(4, 2, 6, 33, 18, ids=((1, 2), (4, 3), (2, 1), (3, 4))),
    "one expert twice": ExpertsCase(2, 2, 3, 32, 32, ids=((1, 1), (2, 0))),
    "everybody chose one": ExpertsCase(70, 1, 3, 40, 24, ids=((2,),) * 70),
    "more pairs than a block": ExpertsCase(190, 3, 7, 33, 17),
    "many experts": ExpertsCase(70, 8, 128, 20, 12),
    "many tokens": ExpertsCase(70, 4, 4, 96, 80),
    "bf16": ExpertsCase(3, 2, 4, 100, 52, DType.bf16),
    "bf16, many tokens": ExpertsCase(40, 2, 4, 100, 52, DType.bf16, DType.bf16),
    "f16": ExpertsCase(9, 2, 4, 50, 35, DType.f16),
    "biases": ExpertsCase(7, 2, 4, 33, 19, attrs=BIASED),
    "a bias behind the sum": ExpertsCase(7, 2, 4, 33, 19, attrs={"extras": ("down_bias",)}),
    "gates and ups in turn": ExpertsCase(7, 2, 4, 33, 19, attrs={"interleaved": True}),
    "transposed": ExpertsCase(7, 2, 4, 33, 19, attrs={"transposed": True}),
    "transposed, one token": ExpertsCase(1, 3, 4, 150, 77, attrs={"transposed": True}),
    "transposed, odd and wide in bf16": ExpertsCase(
        30, 2, 3, 71, 301, DType.bf16, DType.bf16, {"transposed": True}
    ),
    "clamped": ExpertsCase(9, 2, 4, 70, 50, attrs=CLAMPED),
    "clamped, all of it": ExpertsCase(9, 2, 4, 70, 50, attrs={**CLAMPED, **BIASED, "transposed": True}),
    "clamped, all of it in bf16": ExpertsCase(
        40, 2, 4, 70, 50, DType.bf16, DType.bf16, {**CLAMPED, **BIASED, "transposed": True}
    ),
    **{
        name: ExpertsCase(3, 2, 3, 24, 16, attrs={"activation": name})
        for name in ("gelu", "gelu_tanh", "relu")
    },
}
