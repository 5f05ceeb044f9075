"""Element types, tensor types and values of the IR."""

from __future__ import annotations

import builtins
import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import sympy

from .errors import VerifyError
from .index import as_expr, format_expr

if TYPE_CHECKING:
    from torch import dtype as TorchDType


class DType(enum.Enum):
    """Element type. The value is the name used in IR text.

    f8 is e4m3 of the OCP 8-bit floating point specification (2023): no infinity, 448 at most, which a cast makes of
    whatever is larger. Tensors are stored in it; but for casts, views and copies no op computes in it.
    """

    f64 = "f64"
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    f8 = "f8"
    i64 = "i64"
    i32 = "i32"
    i16 = "i16"
    i8 = "i8"
    u8 = "u8"
    bool = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2}.get(self.value, 1)

    @property
    def is_float(self) -> builtins.bool:
        return self in (DType.f64, DType.f32, DType.f16, DType.bf16, DType.f8)

    @property
    def is_int(self) -> builtins.bool:
        return not self.is_float and self is not DType.bool

    @property
    def torch(self) -> TorchDType:
        """The torch dtype of the same name."""
        import torch

        return getattr(torch, _TORCH_NAMES[self.value])

    @staticmethod
    def from_torch(dtype: TorchDType) -> DType:
        """The element type for a torch dtype. Raises VerifyError for one that the IR does not have."""
        name = str(dtype).removeprefix("torch.")
        for ours, theirs in _TORCH_NAMES.items():
            if theirs == name:
                return DType(ours)
        raise VerifyError(f"the IR has no element type for {dtype}")


F8_LARGEST = 448.0
"""The largest finite f8."""

_TORCH_NAMES = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f8": "float8_e4m3fn",
    "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class TensorType:
    """Element type and shape; each dim is a sympy expression over dim symbols such as B and S."""

    dtype: DType
    shape: tuple[sympy.Expr, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> sympy.Expr:
        return sympy.prod(self.shape, start=sympy.Integer(1))

    @property
    def nbytes(self) -> sympy.Expr:
        """Bytes when contiguous, as an expression over dim symbols."""
        return self.numel * self.dtype.itemsize

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(dtype, self.shape)

    def __str__(self) -> str:
        return f"{self.dtype.value}[{', '.join(format_expr(d) for d in self.shape)}]"


def tensor_type(dtype: DType | str, shape: Iterable[int | sympy.Expr | str] = ()) -> TensorType:
    """Build a TensorType from plain ints, expressions or text dims: ``tensor_type("f32", ["B", 4])``."""
    return TensorType(DType(dtype), tuple(as_expr(d) for d in shape))


@dataclass(frozen=True)
class Value:
    """An SSA value: its name is unique within its function."""

    name: str
    type: TensorType

    @property
    def shape(self) -> tuple[sympy.Expr, ...]:
        return self.type.shape

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    def __str__(self) -> str:
        return f"%{self.name}"


def concrete(shape: Iterable[sympy.Expr], dims: Mapping[str, int]) -> tuple[int, ...]:
    """Evaluate a symbolic shape at the given dim sizes. Raises VerifyError when a symbol has no size."""
    return tuple(int(dim) if dim.is_Integer else _evaluated(dim, _sizes_in(dim, dims)) for dim in shape)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def _sizes_in(dim: sympy.Expr, dims: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The sizes of those symbols that an expression holds."""
    return tuple((name, dims[name]) for name in _symbols_in(dim) if name in dims)


@lru_cache(maxsize=4096)
def _symbols_in(dim: sympy.Expr) -> tuple[str, ...]:
    return tuple(sorted(s.name for s in dim.free_symbols))


@lru_cache(maxsize=4096)  # programs evaluate the same few shapes at each call, and substitution takes 10 us
def _evaluated(dim: sympy.Expr, sizes: tuple[tuple[str, int], ...]) -> int:
    given = dict(sizes)
    value = dim.subs({s: given[s.name] for s in dim.free_symbols if s.name in given})
    if not value.is_Integer:
        raise VerifyError(f"dim {format_expr(dim)} has no size: {sorted(s.name for s in value.free_symbols)}")
    return int(value)
