"""C++ spellings of element types: how they are stored, what scalars are computed in, loads, stores and literals."""

from __future__ import annotations

import math

from tilewright.ir.types import DType

STORAGE: dict[DType, str] = {
    DType.f64: "double", DType.f32: "float", DType.f16: "tw::f16", DType.bf16: "tw::bf16", DType.f8: "tw::f8",
    DType.i64: "int64_t", DType.i32: "int32_t", DType.i16: "int16_t", DType.i8: "int8_t", DType.u8: "uint8_t",
    DType.bool: "uint8_t",
}  # fmt: skip

NARROW = (DType.f16, DType.bf16, DType.f8)
"""Floats that are stored only: scalars of them are computed in float."""


def scalar(dtype: DType) -> str:
    """The type that values of ``dtype`` are computed in: half precision in float, bool as bool."""
    if dtype in NARROW:
        return "float"
    return "bool" if dtype is DType.bool else STORAGE[dtype]


def load(dtype: DType, address: str) -> str:
    """The scalar at an lvalue."""
    if dtype in NARROW:
        return f"tw::to_f32({address})"
    return f"({address} != 0)" if dtype is DType.bool else address


def store(dtype: DType, value: str) -> str:
    """A scalar as it is stored."""
    match dtype:
        case DType.bf16:
            return f"tw::to_bf16({value})"
        case DType.f16:
            return f"tw::to_f16({value})"
        case DType.f8:
            return f"tw::to_f8({value})"
        case DType.bool:
            return f"uint8_t({value})"
    return value


def literal(value: float | int | bool, dtype: DType) -> str:
    """A constant of the scalar type of ``dtype``."""
    kind = scalar(dtype)
    if kind == "bool":
        return "true" if value else "false"
    if not dtype.is_float:
        return str(int(value)) if abs(int(value)) < 2**31 else f"INT64_C({int(value)})"
    number = float(value)
    if math.isnan(number):
        return f"std::numeric_limits<{kind}>::quiet_NaN()"
    if math.isinf(number) or (kind == "float" and abs(number) > 3.4028235e38):
        return f"{'-' if number < 0 else ''}std::numeric_limits<{kind}>::infinity()"
    return f"{number!r}f" if kind == "float" else repr(number)
