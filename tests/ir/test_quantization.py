"""Weights as small integers: how far a code may be from its weight, and that ops mean what the functions compute."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import examples
from tilewright.ir.builder import Builder
from tilewright.ir.errors import VerifyError
from tilewright.ir.module import Function, Module
from tilewright.ir.parser import parse_module
from tilewright.ir.quantization import dequantize, quantize, round_activations
from tilewright.ir.reference import evaluate
from tilewright.ir.types import DType, tensor_type
from tilewright.ir.verify import verify_module

GROUP = 32
EPS = 2.0**-24  # rounding to nearest float32, relative
HALF_STEP = (
    0.5 + 2 * 127 * EPS
)  # codes reach 127, and their quotient and scale are rounded before the code is


@st.composite
def matrices(draw: st.DrawFn, groups: int = 3) -> Tensor:
    """f32[1..5, 32..96] of any size that is quantised: spread evenly, off centre, with outliers, equal or zero."""
    rows, columns = draw(st.integers(1, 5)), GROUP * draw(st.integers(1, groups))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    matrix = torch.randn(rows, columns, generator=generator)
    kind = draw(st.sampled_from(("normal", "off centre", "outliers", "few values", "equal", "zero rows")))
    if kind == "off centre":
        matrix += 5
    elif kind == "outliers":
        matrix[:, ::17] *= 40
    elif kind == "few values":
        matrix = matrix.round()
    elif kind == "equal":
        matrix = matrix[:, :1].repeat(1, columns)
    elif kind == "zero rows":
        matrix[::2] = 0
    return matrix * 2.0 ** draw(st.integers(-12, 7))


def restored(matrix: Tensor, bits: int, group: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What is left of a matrix once it is stored as codes."""
    codes, scale, *minimum = quantize(matrix, bits, group)
    return dequantize(codes, scale, minimum[0] if minimum else None, bits, group, dtype)


# int8


@examples(60)
@given(matrices(), st.booleans())
def test_int8_is_within_half_a_step(matrix: Tensor, whole_rows: bool) -> None:
    """A scale of another row or group, or a code cut off instead of rounded, is further from the weight than that."""
    group = matrix.shape[1] if whole_rows else GROUP
    codes, scale = quantize(matrix, 8, group)
    assert codes.dtype == torch.int8
    assert codes.abs().max() <= 127
    assert scale.shape == (matrix.shape[0], matrix.shape[1] // group)
    error = (restored(matrix, 8, group, torch.float64) - matrix.double()).abs()
    assert (error <= scale.double().repeat_interleave(group, 1) * HALF_STEP).all()
    assert (codes[matrix == 0] == 0).all()


def test_int8_of_the_smallest_numbers() -> None:
    """With a scale that is itself subnormal, the largest weight would be more than 127 steps and wrap around."""
    matrix = torch.full((1, 32), 190 * 2.0**-149)
    assert (quantize(matrix, 8, 32)[0] > 0).all()


# int4


@st.composite
def grids(draw: st.DrawFn) -> Tensor:
    """A matrix that scale and minimum in f16 represent, as files in Q4_1 hold it: each group has codes 0 and 15."""
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    codes = torch.randint(0, 16, (rows, groups, GROUP), generator=generator)
    codes[..., 3], codes[..., 20] = 0, 15
    scale = (torch.rand(rows, groups, generator=generator) + 0.5) * 2.0 ** draw(st.integers(-16, 6))
    minimum = torch.randn(rows, groups, generator=generator) * scale * draw(st.sampled_from((0, 1, 8, 100)))
    # f16 has steps of 2**-24 below its normal range, so small scales are on a coarse grid and exact all the same.
    scale, minimum = scale.half().float(), minimum.half().float()
    return (scale[..., None] * codes + minimum[..., None]).flatten(1)


@examples(80)
@given(grids())
def test_int4_recovers_a_grid_exactly(matrix: Tensor) -> None:
    """Weights that were on such a grid before (Q4_1) would lose precision a second time."""
    assert torch.equal(restored(matrix, 4, GROUP), matrix)


@examples(30)
@given(st.floats(-32000, 32000, width=32), st.sampled_from((8, 32)))
def test_equal_values_cost_one_rounding(value: float, group: int) -> None:
    """A group without spread has scale 0; dividing by it, or by a scale refitted to nothing, would give NaN."""
    matrix = torch.full((3, 64), value)
    assert torch.equal(restored(matrix, 4, group), matrix.half().float())
    # 127 * (value / 127): a rounding each, or half the smallest float where the quotient is subnormal.
    error = (restored(matrix, 8, group).double() - matrix.double()).abs()
    assert (error <= 2 * EPS * abs(value) * (1 + EPS) + 127 * 2.0**-150).all()


@examples(60)
@given(matrices())
def test_int4_is_no_worse_than_the_plain_grid(matrix: Tensor) -> None:
    """A search that keeps a grid with a larger error, or that takes one group's grid for another's."""
    grouped = matrix.double().view(-1, GROUP)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale, minimum = ((high - low) / 15).half().double(), low.half().double()
    codes = torch.round((grouped - minimum) / torch.where(scale > 0, scale, 1.0)).clamp(0, 15)
    plain = (codes * scale + minimum - grouped).norm(dim=-1)
    found = (restored(matrix, 4, GROUP, torch.float64).view(-1, GROUP) - grouped).norm(dim=-1)
    # Both grids are compared in float32: each residual is off by four roundings of numbers as large as the weights
    # (the code, the product, the sum, the difference), and the sum of squares by one per element.
    residual = GROUP**0.5 * 4 * EPS * (grouped.abs().amax(-1) + 16 * scale.squeeze(-1))
    assert (found <= plain * (1 + 2 * GROUP * EPS) + 2 * residual).all()


@examples(30)
@given(matrices())
def test_the_parts_of_int4(matrix: Tensor) -> None:
    """Scales are never negative, all parts have the declared types, and no code leaves its half of a byte."""
    codes, scale, minimum = quantize(matrix, 4, GROUP)
    rows, columns = matrix.shape
    assert (codes.dtype, codes.shape) == (torch.uint8, (rows, columns // 2))
    for part in (scale, minimum):
        assert (part.dtype, part.shape) == (torch.float16, (rows, columns // GROUP))
        assert torch.isfinite(part).all()
    assert (scale >= 0).all()


def test_int4_of_the_smallest_numbers() -> None:
    """Where f16 has no scale that is small enough, every weight of a group would become the group's smallest."""
    matrix = torch.randn(8, 32) * 1e-7
    assert (restored(matrix, 4, GROUP) - matrix).norm() <= matrix.norm()


@examples(20)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**16))
def test_where_a_byte_holds_its_two_codes(rows: int, groups: int, seed: int) -> None:
    """Kernels read columns k and k + 4 of eight from one byte; any other order gives them the wrong activations."""
    codes = torch.randint(0, 16, (rows, groups, GROUP), generator=torch.Generator().manual_seed(seed))
    codes[..., 0], codes[..., 1] = 0, 15  # so that scale is 1 and minimum 0
    matrix = codes.flatten(1)
    packed, scale, minimum = quantize(matrix.float(), 4, GROUP)
    assert (scale == 1).all()
    assert (minimum == 0).all()
    for byte in range(matrix.shape[1] // 2):
        low = byte // 4 * 8 + byte % 4
        assert torch.equal(packed[:, byte].long(), matrix[:, low] + 16 * matrix[:, low + 4])
    assert torch.equal(dequantize(packed, scale, minimum, 4, GROUP, torch.float32), matrix.float())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_matrix_may_lie_in_memory_in_any_way(bits: int, dtype: torch.dtype) -> None:
    """GPT-2 stores the transpose of what its products stream, and a weight may be a slice of a larger one."""
    wide = torch.randn(96, 80).to(dtype)
    for matrix in (wide.T, wide[:, 8:72], wide[::3, 16:]):
        for group in (GROUP,) if bits == 4 else (GROUP, matrix.shape[1]):
            if matrix.shape[1] % group == 0:
                expected = quantize(matrix.contiguous(), bits, group)
                for a, b in zip(quantize(matrix, bits, group), expected, strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [8, 4])
def test_large_matrices_are_quantised_in_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that ends within the matrix, and a last piece that is shorter."""
    matrix = torch.randn(7, 64)
    expected = quantize(matrix, bits, GROUP)
    for chunk in (1, 64, 130, 200):
        monkeypatch.setattr("tilewright.ir.quantization._CHUNK", chunk)
        assert all(torch.equal(a, b) for a, b in zip(quantize(matrix, bits, GROUP), expected, strict=True)), (
            chunk
        )


# Activations


@examples(60)
@given(matrices())
def test_rounded_activations(matrix: Tensor) -> None:
    """Each group of 32 has its own scale: zero stays zero, and the largest value stays but for two roundings."""
    rounded = round_activations(matrix, GROUP).double()
    exact = matrix.double()
    largest = exact.view(-1, GROUP).abs().amax(-1).view(matrix.shape[0], -1).repeat_interleave(GROUP, 1)
    # Half a step of the rounded scale, and a rounding of the result.
    assert ((rounded - exact).abs() <= largest / 127 * (1 + EPS) * HALF_STEP + largest * EPS).all()
    assert (rounded[matrix == 0] == 0).all()
    at_top = exact.abs() == largest
    assert ((rounded - exact).abs()[at_top] <= 2 * EPS * (1 + EPS) * largest[at_top]).all()


def test_rounded_activations_of_any_rank() -> None:
    """Groups run along the last dim alone, whatever stands before it."""
    x = torch.randn(2, 3, 64)
    expected = [[round_activations(x[b, s], GROUP) for s in range(3)] for b in range(2)]
    assert torch.equal(round_activations(x, GROUP), torch.stack([torch.stack(row) for row in expected]))
    assert torch.equal(round_activations(x[0, 0], GROUP), expected[0][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_activations_of_two_bytes(dtype: torch.dtype) -> None:
    """Codes and scales that are rounded to two bytes on the way must not add more than storing the result does."""
    x = torch.randn(64, 256).to(dtype)
    rounded = round_activations(x, GROUP).double()
    largest = x.double().view(64, -1, GROUP).abs().amax(-1).repeat_interleave(GROUP, 1)
    storing = torch.finfo(dtype).eps / 2 * largest
    assert ((rounded - x.double()).abs() <= largest / 127 * HALF_STEP + storing).all()


# The ops

TYPES = {8: (DType.i8, DType.f32), 4: (DType.u8, DType.f16, DType.f16)}


def stored_and_read(rows: int, columns: int, bits: int, group: int, dtype: DType = DType.f32) -> Module:
    """A module that quantises its input, and gives the parts and the matrix that they stand for."""
    b = Builder()
    w = b.param_value("w", tensor_type(dtype, (rows, columns)))
    parts = b.add_multi("quantize", w, bits=bits, group=group)
    y = b.add("dequantize", *parts, type=w.type, bits=bits, group=group)
    return Module((Function("main", (w,), tuple(b.ops), (*parts, y)),), ())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 32, 32), (7, 64, 32), (5, 96, 96), (3, 40, 8)])
@pytest.mark.parametrize("dtype", [DType.f32, DType.bf16, DType.f16, DType.f64])
def test_the_ops_are_the_functions(bits: int, rows: int, columns: int, group: int, dtype: DType) -> None:
    """The evaluator is the oracle of all kernels: results in the declared types, matrix as the function gives it."""
    module = stored_and_read(rows, columns, bits, group, dtype)
    verify_module(module)
    w = torch.randn(rows, columns).to(dtype.torch)
    *parts, y = evaluate(module, [w], {}, {})
    for found, expected, kind in zip(parts, quantize(w, bits, group), TYPES[bits], strict=True):
        assert found.dtype == kind.torch
        assert torch.equal(found, expected)
    wide = torch.float64 if dtype is DType.f64 else torch.float32
    assert y.dtype == dtype.torch
    assert torch.equal(y, restored(w, bits, group, wide).to(dtype.torch))
    (exact,) = evaluate(module, [w], {}, {}, exact=True)[-1:]
    assert torch.equal(exact, restored(w, bits, group, torch.float64))


def test_a_product_with_rounded_activations() -> None:
    """The attribute rounds the left operand and leaves the weights."""
    b = Builder()
    x, w = (b.param_value(n, tensor_type("f32", s)) for n, s in (("x", (2, 3, 64)), ("w", (5, 64))))
    y = b.add("matmul", x, w, activation_group=GROUP)
    module = Module((Function("main", (x, w), tuple(b.ops), (y,)),), ())
    verify_module(module)
    given_x, given_w = torch.randn(2, 3, 64), torch.randn(5, 64)
    (found,) = evaluate(module, [given_x, given_w], {}, {})
    assert torch.equal(found, round_activations(given_x, GROUP) @ given_w.T)


TEXT = """
entry @main
symbol B [1, 4]

func @main(%x: f32[B, 64], %w: f32[6, 64], %v: i8[6, 64], %n: i64[B], %b: f32[1, 6, 64]) -> (%y) {{
  %c, %s = quantize %w {{bits = 8, group = 64}} : (i8[6, 64], f32[6, 1])
  %d, %t, %m = quantize %w {{bits = 4, group = 32}} : (u8[6, 32], f16[6, 2], f16[6, 2])
  {line}
  %y = neg %x : f32[B, 64]
}}
"""

LINES = {
    "bits": ("%p, %q = quantize %w {bits = 3, group = 64} : (i8[6, 64], f32[6, 1])", "4 and 8 bits, not 3"),
    "bits to read": ("%p = dequantize %c, %s {bits = 2, group = 64} : f32[6, 64]", "4 and 8 bits, not 2"),
    "no group": ("%p, %q = quantize %w {bits = 8, group = 0} : (i8[6, 64], f32[6, 1])", "bad group 0"),
    "group of no octets": (
        "%p, %q, %r = quantize %w {bits = 4, group = 4} : (u8[6, 32], f16[6, 16], f16[6, 16])",
        "bad group 4",
    ),
    "group beyond the row": (
        "%p, %q = quantize %w {bits = 8, group = 48} : (i8[6, 64], f32[6, 1])",
        "K must be a multiple of group",
    ),
    "group beyond the result": ("%p = dequantize %c, %s {bits = 8, group = 48} : f32[6, 64]", "multiple of group"),
    "rank 3": ("%p, %q = quantize %b {bits = 8, group = 64} : (i8[6, 64], f32[6, 1])", "takes a float matrix"),
    "integers": ("%p, %q = quantize %v {bits = 8, group = 64} : (i8[6, 64], f32[6, 1])", "takes a float matrix"),
    "a run-time dim": ("%p, %q = quantize %x {bits = 8, group = 64} : (i8[B, 64], f32[B, 1])", "multiple of group"),
    "two matrices": ("%p, %q = quantize %w, %w {bits = 8, group = 64} : (i8[6, 64], f32[6, 1])", "operand"),
    "result types": (
        "%p, %q = quantize %w {bits = 8, group = 64} : (u8[6, 64], f32[6, 1])",
        "they follow as i8[6, 64], f32[6, 1]",
    ),
    "scales of another group": ("%p = dequantize %c, %s {bits = 8, group = 32} : f32[6, 64]", "i8[6, 64], f32[6, 2]"),
    "codes of 8 bits as 4": ("%p = dequantize %c, %t, %m {bits = 4, group = 32} : f32[6, 64]", "takes u8[6, 32]"),
    "codes of 4 bits as 8": ("%p = dequantize %d, %s {bits = 8, group = 64} : f32[6, 64]", "takes i8[6, 64]"),
    "no minimum": ("%p = dequantize %d, %t {bits = 4, group = 32} : f32[6, 64]", "operand"),
    "a minimum too many": ("%p = dequantize %c, %s, %s {bits = 8, group = 64} : f32[6, 64]", "operand"),
    "integers as result": ("%p = dequantize %c, %s {bits = 8, group = 64} : i8[6, 64]", "gives a float matrix"),
    "no bits": ("%p = dequantize %c, %s {group = 64} : f32[6, 64]", "missing attributes ['bits']"),
    "activation group": ("%p = matmul %x, %w {activation_group = 48} : f32[B, 6]", "no multiple of 48"),
    "activation group of none": ("%p = matmul %x, %w {activation_group = 0} : f32[B, 6]", "no multiple of 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_misuse_is_refused(case: str) -> None:
    """A pass that builds such an op would fail in a kernel, or read the wrong memory."""
    line, message = LINES[case]
    with pytest.raises(VerifyError, match=re.escape(message)):
        verify_module(parse_module(TEXT.format(line=line)))


def test_text_of_quantised_modules() -> None:
    """Dumps and golden files hold these ops; what is printed parses back to the same module."""
    lines = """%p = dequantize %c, %s {bits = 8, group = 64} : f32[6, 64]
  %q = dequantize %d, %t, %m {bits = 4, group = 32} : bf16[6, 64]
  %r = matmul %x, %p {activation_group = 32} : f32[B, 6]"""
    module = parse_module(TEXT.format(line=lines))
    verify_module(module)
    assert parse_module(str(module)) == module
    opcodes = [op.opcode for op in module.main.ops]
    assert opcodes == ["quantize", "quantize", "dequantize", "dequantize", "matmul", "neg"]
    assert module.main.ops[4].attr("activation_group") == 32
