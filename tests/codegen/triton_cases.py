"""Small fused kernels, built by hand, that exercise every template of the Triton backend (and of C++).

Each case is one module whose entry holds one ``kernel`` op. The interpreter tests, the offline compilation tests and
the GPU tests all run this list; the reference evaluator says what is right.
"""

from __future__ import annotations

from . import (  # noqa: F401 - each adds its cases to the list
    attention_cases,
    f8_cases,
    matrix_cases,
    pointwise_cases,
    product_cases,
    quantized_cases,
    recurrent_cases,
    reduction_cases,
)
from .kernel_case import CASES as CASES
