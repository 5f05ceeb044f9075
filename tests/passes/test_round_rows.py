"""The pass that rounds rows before products of integers: what a product may do by itself, said in ops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilewright.ir.module import Module, walk
from tilewright.ir.parser import parse_module
from tilewright.ir.reference import evaluate
from tilewright.ir.verify import verify_module
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes
from tilewright.passes.round_rows import round_rows

TEXT = """entry @main
symbol B [1, 4]

func @main(%x: {dtype}[{rows}, 64]) -> (%y, %z) {{
  %w = param {{name = "w"}} : {dtype}[48, 64]
  %v = param {{name = "v"}} : {dtype}[{batch}16, 64]
  %y = matmul %x, %w {{activation_group = 32}} : {dtype}[{rows}, 48]
  %z = matmul %x, %v {{{attr}}} : {dtype}[{rows}, 16]
}}
"""
ROUND = PassOptions(round_rows="all")
TOLERANCE = {"f32": {"rtol": 1e-5, "atol": 1e-4}, "bf16": {"rtol": 0.02, "atol": 0.1}}
"""What is rounded becomes bf16 once more, before sums of 64 products of numbers about 1."""
RMS_NORM = """entry @main
symbol B [1, 4]

func @main(%x: f32[B, 1, 64]) -> (%y, %z) {
  %w = param {name = "w"} : f32[64, 64]
  %u = param {name = "u"} : f32[64, 64]
  %squares = mul %x, %x : f32[B, 1, 64]
  %total = reduce %squares {kind = "sum", axes = (2), keepdim = true} : f32[B, 1, 1]
  %eps = const {value = 0.01} : f32[]
  %shifted = add %total, %eps : f32[B, 1, 1]
  %factor = rsqrt %shifted : f32[B, 1, 1]
  %normal = mul %x, %factor : f32[B, 1, 64]
  %y = matmul %normal, %w : f32[B, 1, 64]
  %s = sigmoid %y : f32[B, 1, 64]
  %z = matmul %s, %u : f32[B, 1, 64]
}
"""


def module_of(
    rows: str = "3, 1", dtype: str = "f32", attr: str = "activation_group = 16", batch: str = ""
) -> Module:
    return parse_module(TEXT.format(rows=rows, dtype=dtype, attr=attr, batch=batch))


def opcodes(module: Module) -> list[str]:
    return [op.opcode for op in module.main.ops]


@pytest.mark.parametrize("rows", ["3, 1", "5", "2, 3"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_rows_mean_what_the_product_may_round_them_to(rows: str, dtype: str) -> None:
    """In runs of the product's own length; of any rank."""
    module = module_of(rows, dtype)
    found = round_rows(module, ROUND)
    verify_module(found)
    assert not any(op.attr("activation_group") for op in found.main.ops)
    assert [op.attr("group") for op in found.main.ops if op.opcode == "quantize"] == [32, 16]
    generator = torch.Generator().manual_seed(0)
    shape = [int(d) for d in rows.split(",")]
    type = getattr(torch, {"f32": "float32", "bf16": "bfloat16"}[dtype])
    x, w, v = (torch.randn(*s, 64, generator=generator).to(type) for s in (shape, (48,), (16,)))
    dims, weights = {"B": 1}, {"w": w, "v": v}
    for ours, theirs in zip(
        evaluate(found, [x], weights, dims), evaluate(module, [x], weights, dims), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


def test_only_products_that_may_round_are_changed() -> None:
    """Not one without the attribute, nor of rows whose number nobody knows yet; nothing where the option is not set."""
    assert "quantize" not in opcodes(round_rows(module_of("B, 1"), ROUND))
    module = module_of(attr="")
    assert opcodes(round_rows(module, ROUND)).count("quantize") == 1
    assert round_rows(module, PassOptions()) is module


def test_only_bytes_with_one_scale_to_a_row_are_asked_for() -> None:
    """Of these tensor cores take rows of bytes; of other codes, and of floats, they do not."""
    text = """entry @main

func @main(%x: f32[12, 64], %c: i8[48, 64], %s: f32[48, 1], %t: f32[48, 2], %u: f32[48, 64]) -> (%y, %z, %v) {
  %w1 = dequantize %c, %s {bits = 8, group = 64} : f32[48, 64]
  %w2 = dequantize %c, %t {bits = 8, group = 32} : f32[48, 64]
  %y = matmul %x, %w1 {activation_group = 32} : f32[12, 48]
  %z = matmul %x, %w2 {activation_group = 32} : f32[12, 48]
  %v = matmul %x, %u {activation_group = 32} : f32[12, 48]
}
"""
    found = round_rows(parse_module(text), PassOptions(round_rows="bytes"))
    assert opcodes(found).count("quantize") == 1
    assert [op.attr("activation_group", 0) for op in found.main.ops if op.opcode == "matmul"] == [0, 32, 32]


def test_products_of_a_batch_are_left_alone() -> None:
    """Their weights are no codes that a product of integers reads."""
    found = round_rows(module_of(rows="3, 1", batch="3, "), ROUND)
    assert opcodes(found).count("quantize") == 1
    assert found.main.ops[-1].attr("activation_group") == 16


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_norm_and_the_rounding_are_one_kernel_and_products_read_codes(form: str) -> None:
    """Whole pipeline: neither the norm nor the rounding is computed again in the tiles of a product."""
    options = PassOptions((("B", 3),), weights=form, activation_group=32, round_rows="all", plain_rows=True)
    main = run_passes(parse_module(RMS_NORM), options).main
    kernels = [[op.opcode for op in kernel.body] for kernel in main.ops if kernel.opcode == "kernel"]
    assert [str(k.attr("name")).rpartition("_")[2] for k in main.ops if k.opcode == "kernel"] == [
        "quantize",
        "matmul",
        "quantize",
        "matmul",
    ]
    assert {"reduce", "rsqrt"} <= set(kernels[0])
    for product in kernels[1::2]:
        assert product.count("dequantize") == 2
        assert not {"quantize", "reduce", "rsqrt"} & set(product)
    assert [v.dtype.value for v in main.ops[-1].operands].count("i8") >= 1
    assert not any(op.attr("activation_group") for op in walk(main.ops))


def test_a_merge_stays_a_kernel_of_its_own() -> None:
    """Each element of what is rounded is a sum: rounding would need it twice, and the sums of its whole group."""
    text = """entry @main

func @main(%x: f32[3, 2, 4, 32], %c: i8[48, 64], %s: f32[48, 1]) -> (%y) {
  %1 = reduce %x {kind = "sum", axes = (2), keepdim = false} : f32[3, 2, 32]
  %2 = mul %1, %1 : f32[3, 2, 32]
  %3 = view %2 {map = (i0, i1) -> (i0, (i1 // 32), (i1 % 32))} : f32[3, 64]
  %w = dequantize %c, %s {bits = 8, group = 64} : f32[48, 64]
  %y = matmul %3, %w {activation_group = 32} : f32[3, 48]
}
"""
    main = run_passes(parse_module(text), replace(ROUND, plain_rows=True)).main
    bodies = [{op.opcode for op in kernel.body} for kernel in main.ops]
    assert [sorted(b & {"reduce", "mul", "quantize", "matmul"}) for b in bodies] == [
        ["mul", "reduce"],
        ["quantize"],
        ["matmul"],
    ]
