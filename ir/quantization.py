"""Weights as small integers: what ``quantize``, ``dequantize`` and a matmul's ``activation_group`` mean, in torch.

int8, symmetric:   w = scale * code              code in [-127, 127]; scale f32, one per ``group`` columns of a row
int4, asymmetric:  w = scale * code + minimum    code in [0, 15]; scale and minimum f16, one pair per group

A byte of int4 codes holds columns ``k`` (low bits) and ``k + 4`` (high bits) of each run of eight columns: the order in
which a kernel meets them when it works on four columns at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sympy import Expr
from torch import Tensor

from .types import DType, TensorType

INT8_LARGEST = 127
INT4_LARGEST = 15
# Elements quantised at a time: few enough for the passes over them to run in cache, on a GPU so many that a pass takes
# longer than its launch.
_CHUNK, _GPU_CHUNK = 1 << 20, 1 << 23
_SHRINK = (0.96, 0.92, 0.88, 0.84)
_F16_SMALLEST = 2.0**-24
_EXACT = 2.0**-18  # relative to the step of the grid: a group this close to it lies on it


Quantize = Callable[[Tensor, int, int], tuple[Tensor, ...]]
"""A function with the arguments and results of :func:`quantize`."""


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, ...]:
    """A matrix [N, K] as (codes, scale) for 8 bits or (codes, scale, minimum) for 4 bits.

    codes: i8[N, K], or u8[N, K / 2]. scale and minimum: [N, K / group], f32 for 8 bits, f16 for 4. K must be a multiple
    of ``group``, which for 4 bits is a multiple of 8. A group of equal values is exact.
    """
    rows, columns = weight.shape
    step = max(1, (_GPU_CHUNK if weight.is_cuda else _CHUNK) // columns)
    round_rows = CODES[bits].round_rows
    parts = [round_rows(weight[n : n + step].float().contiguous(), group) for n in range(0, rows, step)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def dequantize(
    codes: Tensor, scale: Tensor, minimum: Tensor | None, bits: int, group: int, dtype: torch.dtype
) -> Tensor:
    """The matrix [N, K] that codes stand for, computed in ``dtype``."""
    codes = CODES[bits].unpack(codes)
    grouped = codes.view(codes.shape[0], -1, group).to(dtype) * scale.to(dtype)[..., None]
    if minimum is not None:
        grouped = grouped + minimum.to(dtype)[..., None]
    return grouped.reshape(codes.shape)


def round_activations(x: Tensor, group: int) -> Tensor:
    """x[.., K] with each run of ``group`` values rounded to int8 multiples of its own scale, the largest at 127."""
    grouped = x.unflatten(-1, (-1, group))
    scale = grouped.abs().amax(-1, keepdim=True) / INT8_LARGEST
    codes = torch.round(grouped / torch.where(scale > 0, scale, torch.ones_like(scale)))
    return (codes * scale).flatten(-2)


def _int8(weight: Tensor, group: int) -> tuple[Tensor, ...]:
    grouped = weight.view(weight.shape[0], -1, group)
    scale = grouped.abs().amax(-1, keepdim=True) / INT8_LARGEST
    codes = torch.round(grouped / torch.where(scale > 0, scale, 1.0)).clamp_(-INT8_LARGEST, INT8_LARGEST)
    codes = codes.to(torch.int8)
    return codes.view(weight.shape), scale.squeeze(-1)


def _int4(weight: Tensor, group: int) -> tuple[Tensor, ...]:
    """The grid from the smallest to the largest value of a group; where the group does not lie on it, the best of a few
    narrower ones, each refitted to its codes by least squares."""
    grouped = weight.view(-1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale, minimum = _as_f16((high - low) / INT4_LARGEST, low)
    scale = torch.where(high > low, scale.clamp(min=_F16_SMALLEST), scale)
    codes = _int4_codes(grouped, scale, minimum)
    error = _error(grouped, codes, scale, minimum)
    off = (error > group * (scale.abs() * _EXACT) ** 2).squeeze(-1).nonzero().squeeze(-1)
    if off.numel():
        best = (codes[off], scale[off], minimum[off], error[off])
        codes[off], scale[off], minimum[off] = _search(grouped[off], low[off], high[off], best)
    rows = weight.shape[0]
    return _pack(codes.view(weight.shape)), scale.view(rows, -1).half(), minimum.view(rows, -1).half()


def _search(
    grouped: Tensor, low: Tensor, high: Tensor, best: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    for shrink in (1.0, *_SHRINK):
        margin = (high - low) * (1 - shrink) / 2
        scale, minimum = (high - low) * shrink / INT4_LARGEST, low + margin
        codes = _int4_codes(grouped, *_as_f16(scale, minimum))
        scale, minimum = _as_f16(*_least_squares(grouped, codes, scale, minimum))
        codes = _int4_codes(grouped, scale, minimum)
        found = (codes, scale, minimum, _error(grouped, codes, scale, minimum))
        better = found[-1] < best[-1]
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    return best[0], best[1], best[2]


def _least_squares(grouped: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum that bring ``scale * codes + minimum`` closest; the given ones where all codes are equal."""
    mean_code, mean = codes.mean(-1, keepdim=True), grouped.mean(-1, keepdim=True)
    centred = codes - mean_code
    spread = centred.square().sum(-1, keepdim=True)
    fitted = (centred * grouped).sum(-1, keepdim=True) / spread.clamp(min=1e-12)
    usable = (spread > 0) & (fitted > 0)
    return torch.where(usable, fitted, scale), torch.where(usable, mean - fitted * mean_code, minimum)


def _as_f16(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    return scale.half().float(), minimum.half().float()


def _int4_codes(grouped: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    codes = torch.round((grouped - minimum) / torch.where(scale > 0, scale, 1.0))
    return codes.clamp_(0, INT4_LARGEST)


def _error(grouped: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return (codes * scale + minimum - grouped).square().sum(-1, keepdim=True)


def _pack(codes: Tensor) -> Tensor:
    octets = codes.to(torch.uint8).view(codes.shape[0], -1, 2, 4)
    return (octets[:, :, 0] | octets[:, :, 1] << 4).view(codes.shape[0], -1)


def _unpack(packed: Tensor) -> Tensor:
    quads = packed.view(packed.shape[0], -1, 1, 4)
    return torch.cat([quads & 15, quads >> 4], dim=2).view(packed.shape[0], -1)


@dataclass(frozen=True)
class Codes:
    """Codes of some width: how they are stored, and which factors go with them.

    dtype holds ``per_byte`` codes, those of every ``run // per_byte``-th column of a run of columns, the first in the
    lowest bits. factors: names of what a group of columns has one of each of, in ``factor_dtype``. round_rows: a float
    matrix and its group -> codes and factors. unpack: stored codes [N, K / per_byte] -> codes [N, K].
    """

    bits: int
    dtype: DType
    per_byte: int
    run: int
    factors: tuple[str, ...]
    factor_dtype: DType
    round_rows: Callable[[Tensor, int], tuple[Tensor, ...]]
    unpack: Callable[[Tensor], Tensor]

    def types(self, rows: Expr, columns: Expr, group: int) -> tuple[TensorType, ...]:
        """Of the codes and of each factor of a matrix [rows, columns]."""
        factor = TensorType(self.factor_dtype, (rows, columns / group))
        return TensorType(self.dtype, (rows, columns / self.per_byte)), *(factor for _ in self.factors)


def _as_stored(codes: Tensor) -> Tensor:
    return codes


CODES = {
    codes.bits: codes
    for codes in (
        Codes(4, DType.u8, 2, 8, ("scale", "minimum"), DType.f16, _int4, _unpack),
        Codes(8, DType.i8, 1, 1, ("scale",), DType.f32, _int8, _as_stored),
    )
}
"""The widths that there are, by their bits."""
