"""Which decode steps with integer weights read rows that a kernel of their own has rounded."""

from __future__ import annotations

import pytest

from tests.codegen.triton_programs import plan
from tilewright.phases import rounded_rows

from .models import tiny


@pytest.mark.parametrize(
    ("weights", "batch", "products"),
    [
        ("int8", 1, ""), ("int8", 8, "all"), ("int8", 9, "bytes"), ("int8", 32, "bytes"), ("int8", 33, ""),
        ("int4", 8, "all"), ("int4", 9, ""),
    ],
)  # fmt: skip
def test_rows_of_some_batches_are_rounded_beforehand_on_a_gpu(
    weights: str, batch: int, products: str
) -> None:
    """As many as its kernels multiply as integers; elsewhere products round what they read."""
    assert rounded_rows("triton", weights, batch) == products
    assert rounded_rows("cpp", weights, batch) == ""


def test_of_larger_batches_only_bytes_are_rounded_beforehand() -> None:
    """A table that is the embedding, too, has a scale per 32 columns, and multiplies floats from nine rows on."""
    decode = plan(tiny("llama"), (8, 16), weights="int8").modules
    for batch, rounded in ((8, 1), (16, 0)):
        main, layer = (decode[f"decode_b{batch}"].function(name) for name in ("main", "layer0"))
        opcodes = [[inner.opcode for op in f.ops for inner in op.body] for f in (main, layer)]
        assert [found.count("quantize") for found in opcodes] == [rounded, 4]
