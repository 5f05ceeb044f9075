"""The hand-written elementary functions and conversions, against float64 and torch over wide ranges."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tilewright.codegen.cpp import build
from tilewright.codegen.cpp.build import build_libraries

FUNCTIONS = ("exp", "log", "tanh", "erf", "sigmoid", "sin", "cos", "rsqrt")
SOURCE = """
#include <cstdint>
#include "tilewright/math.h"
#include "tilewright/types.h"
{functions}
{divisions}
extern "C" __attribute__((visibility("default"))) void narrow(const float* x, uint16_t* bf, uint16_t* half, long n) {{
#pragma omp simd
    for (long i = 0; i < n; i++) {{ bf[i] = tw::to_bf16(x[i]).bits; half[i] = tw::to_f16(x[i]).bits; }}
}}
extern "C" __attribute__((visibility("default"))) void widen(const uint16_t* x, float* bf, float* half, long n) {{
#pragma omp simd
    for (long i = 0; i < n; i++) {{ bf[i] = tw::to_f32(tw::bf16{{x[i]}}); half[i] = tw::to_f32(tw::f16{{x[i]}}); }}
}}
"""
ONE = """
extern "C" __attribute__((visibility("default"))) void f_{name}(const float* x, float* y, long n) {{
#pragma omp simd
    for (long i = 0; i < n; i++) y[i] = tw::{name}(x[i]);
}}
"""
DIVIDE = """
extern "C" __attribute__((visibility("default")))
void divide_{name}(const {type}* a, const {type}* b, {type}* q, {type}* r, long n) {{
#pragma omp simd
    for (long i = 0; i < n; i++) {{
        q[i] = tw::floor_div<{type}>(a[i], b[i]);
        r[i] = tw::floor_mod<{type}>(a[i], b[i]);
    }}
}}
"""
INTEGERS = {torch.int8: "int8_t", torch.uint8: "uint8_t", torch.int32: "int32_t", torch.int64: "int64_t"}
OF_VECTORS = """
#include "tilewright/softmax.h"
extern "C" __attribute__((visibility("default"))) void f_exp_negative(const float* x, float* y, long n) {
    for (long i = 0; i < n; i += tw::VW) {
        const int left = n - i < tw::VW ? int(n - i) : tw::VW;
        tw::vstore_n(y + i, tw::vexp_negative(tw::vload_n(x + i, left)), left);
    }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("math")
    folder.chmod(0o700)
    source = SOURCE.format(
        functions="".join(ONE.format(name=name) for name in FUNCTIONS),
        divisions="".join(DIVIDE.format(name=type_, type=type_) for type_ in INTEGERS.values()),
    )
    return ctypes.CDLL(str(build_libraries({"math": source}, folder)["math"].path))


def _call(function: Callable[..., None], *tensors: Tensor) -> None:
    function(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), ctypes.c_long(tensors[0].numel()))


def _ulps(found: Tensor, truth: Tensor) -> Tensor:
    """Errors in units of the last place of a float32 of the true value's size."""
    _, exponent = torch.frexp(truth)
    unit = torch.ldexp(torch.ones_like(truth), exponent.clamp(min=-125) - 24)
    return (found.double() - truth).abs() / unit


@pytest.mark.parametrize(
    ("name", "low", "high", "ulps"),
    [
        ("exp", -87, 88, 1.5),
        ("exp", -1, 1, 1.0),
        ("log", 1e-45, 1e-37, 1.0),
        ("log", 0.1, 3, 1.0),
        ("log", 1, 3e38, 1.0),
        ("tanh", -12, 12, 2.0),
        ("erf", -5, 5, 2.0),
        ("sigmoid", -80, 80, 3.0),
        ("sin", -10, 10, 2.0),
        ("sin", -1e5, 1e5, 2.0),
        ("cos", -1e5, 1e5, 2.0),
        ("rsqrt", 1e-30, 1e30, 1.5),
    ],
)
def test_accuracy(library: ctypes.CDLL, name: str, low: float, high: float, ulps: float) -> None:
    x = torch.linspace(low, high, 1_000_003, dtype=torch.float64).float()
    y = torch.empty_like(x)
    _call(getattr(library, f"f_{name}"), x, y)
    truth = getattr(torch, name)(x.double())
    assert _ulps(y, truth).max() <= ulps


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(library: ctypes.CDLL, name: str) -> None:
    """Infinities, zeros and NaN give what torch gives; a NaN never becomes a number."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e30, -1e30] * 8)
    if name in ("sin", "cos"):
        x = x[x.abs() < 1e5]
    y = torch.empty_like(x)
    _call(getattr(library, f"f_{name}"), x, y)
    torch.testing.assert_close(y, getattr(torch, name)(x), equal_nan=True)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_division(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """As torch divides; a divisor of 0, which it refuses, gives a quotient of 0 and does not end the process."""
    limits = torch.iinfo(dtype)
    numbers = torch.tensor([limits.min, limits.max, *range(-9 if limits.min else 0, 10)], dtype=dtype)
    a, b = (t.contiguous() for t in torch.cartesian_prod(numbers, numbers).T)
    q, r = torch.empty_like(a), torch.empty_like(a)
    _call(getattr(library, f"divide_{INTEGERS[dtype]}"), a, b, q, r)
    some = b != 0
    assert torch.equal(q[some], a[some] // b[some])
    assert torch.equal(r[some], a[some] % b[some])
    assert not q[~some].any()
    assert torch.equal(r[~some], a[~some])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize(
    "flags", [(), ("-mno-avx512f",), ("-march=x86-64",)], ids=["all", "avx2", "baseline"]
)
def test_exponentials_of_softmax(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accurate wherever they count, exactly 0 for masked scores, NaN of NaN; by each width of vectors."""
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    tmp_path.chmod(0o700)
    library = ctypes.CDLL(str(build_libraries({"softmax": OF_VECTORS}, tmp_path)["softmax"].path))
    x = torch.linspace(-86.9, 0, 1_000_003, dtype=torch.float64).float()
    y = torch.empty_like(x)
    _call(library.f_exp_negative, x, y)
    assert _ulps(y, torch.exp(x.double())).max() <= 1.5

    special = torch.tensor([0.0, -0.0, torch.nan, -torch.inf, -1e30, -1e5, -200.0, -103.0, -87.1])
    found = torch.empty_like(special)
    _call(library.f_exp_negative, special, found)
    assert found[:2].tolist() == [1, 1]
    assert found[2].isnan()
    assert found[3:].tolist() == [0] * 6


def test_half_precision_conversions(library: ctypes.CDLL) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    bf, half = torch.empty(65536), torch.empty(65536)
    _call(library.widen, bits, bf, half)
    assert torch.equal(bf.nan_to_num(7.5), bits.view(torch.bfloat16).float().nan_to_num(7.5))
    assert torch.equal(half.nan_to_num(7.5), bits.view(torch.float16).float().nan_to_num(7.5))

    patterns = torch.randint(-(2**31), 2**31, (1_000_000,), dtype=torch.int64).to(torch.int32)
    near = torch.randn(1_000_000) * torch.logspace(-9, 6, 1_000_000)
    x = torch.cat(
        [patterns.view(torch.float32), near, torch.tensor([65504.0, 65519.9, 65520.0, 2**-25, 3 * 2**-26])]
    )
    bf_bits, half_bits = torch.empty(len(x), dtype=torch.uint16), torch.empty(len(x), dtype=torch.uint16)
    _call(library.narrow, x, bf_bits, half_bits)
    for found, dtype in (
        (bf_bits.view(torch.bfloat16), torch.bfloat16),
        (half_bits.view(torch.float16), torch.float16),
    ):
        assert torch.equal(found.isnan(), x.isnan())
        numbers = ~x.isnan()
        assert torch.equal(found[numbers], x.to(dtype)[numbers])
