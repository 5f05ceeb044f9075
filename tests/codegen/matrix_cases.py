"""Products whose factors are matrices that TMA may copy: rows of whole multiples of 16 bytes.

No block divides N or the number of rows (one, four or 38), and most do not divide K.
"""

from __future__ import annotations

from tilewright.ir.builder import Builder
from tilewright.ir.types import DType, tensor_type

from .kernel_case import Case, case, finish
from .product_cases import biased, gated_product, in_parts, rotary

MATRICES = tuple((d, r) for d in (DType.f32, DType.bf16) for r in ("many", "four"))


@case("matrix", *MATRICES, (DType.f16, "many"))
def matrix(dtype: DType, rows: str) -> Case:
    """Both factors are as they lie in memory."""
    return biased(dtype, rows, 72)


@case("matrix_alone")
def matrix_alone() -> Case:
    """A prompt of one token: a number of rows known at run time only, and it is 1."""
    return biased(DType.bf16, "many", 72, B=1, S=1)


@case("matrix_gated", *MATRICES)
def matrix_gated(dtype: DType, rows: str) -> Case:
    """The row operand is computed, and reduced; two products read the same matrix at other rows."""
    return gated_product(dtype, rows, 72)


@case("matrix_heads", *MATRICES)
def matrix_heads(dtype: DType, rows: str) -> Case:
    """Three segments; in two of them rows of the weight are the halves of heads of 32."""
    return rotary(dtype, rows, 32)


@case("matrix_parts", *((d, r, k) for d, r in MATRICES for k in (64, 144)))
def matrix_parts(dtype: DType, rows: str, k: int) -> Case:
    """Parts along K: blocks of 16 or 32 end with a part of 32 columns, but in the middle of one of 72."""
    return in_parts(dtype, rows, k)


@case("matrix_batched", (DType.bf16,))
def matrix_batched(dtype: DType) -> Case:
    """A product of two batched operands, whose matrices lie one after the other."""
    b = Builder()
    x = b.param_value("x", tensor_type(dtype, ["B", 3, "S", 24]))
    y = b.param_value("y", tensor_type(dtype, ["B", 3, 10, 24]))
    return finish(b, b.add("matmul", x, y), B=2, S=21)
