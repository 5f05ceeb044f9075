"""4-bit codes made in C++ are as good as those that define the op, whatever the matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests.ir.test_quantization import EPS, GROUP, grids, matrices
from tests.strategies import examples
from tilewright import quantize_native
from tilewright.ir.quantization import dequantize, quantize
from tilewright.quantize_native import NativeQuantize, quantizer


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> NativeQuantize:
    folder = tmp_path_factory.mktemp("kernels")
    folder.chmod(0o700)
    found = NativeQuantize(folder)
    assert found._function is not None
    return found


def restored(parts: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    codes, scale, minimum = parts
    return dequantize(codes, scale, minimum, 4, GROUP, dtype)


@examples(100)
@given(matrix=matrices())
def test_it_is_as_close_as_the_definition(native: NativeQuantize, matrix: Tensor) -> None:
    """A candidate left out, a sum that is wrong, a nibble in another's place."""
    ours, theirs = native(matrix, 4, GROUP), quantize(matrix, 4, GROUP)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    found, expected = (
        (restored(parts) - matrix.double()).view(-1, GROUP).norm(dim=-1) for parts in (ours, theirs)
    )
    # Both compare grids by sums in float32, rounded differently, so one of two nearly equal grids may take the other's
    # place: of 240,000 groups, the worst was 1% further away.
    rounding = GROUP**0.5 * 8 * EPS * matrix.double().abs().view(-1, GROUP).amax(-1)
    assert (found <= expected * 1.02 + rounding).all()


@examples(60)
@given(matrix=grids())
def test_it_recovers_a_grid_exactly(native: NativeQuantize, matrix: Tensor) -> None:
    assert torch.equal(restored(native(matrix, 4, GROUP), torch.float32), matrix)


def test_other_dtypes_and_strides_in_pieces(native: NativeQuantize, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie apart, columns that do, and the last piece, which is shorter."""
    matrix = torch.randn(70, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = native(matrix.float(), 4, GROUP)
    monkeypatch.setattr(quantize_native, "_ELEMENTS", 128 * 16)
    for same in (matrix, matrix.repeat(1, 2)[:, :128], matrix.t().contiguous().t()):
        assert all(torch.equal(a, b) for a, b in zip(native(same, 4, GROUP), expected, strict=True))


def test_what_it_leaves_to_the_definition(native: NativeQuantize, tmp_path: Path) -> None:
    """Other widths and groups, and a machine without a compiler, where compiling says so later."""
    matrix = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    without = NativeQuantize(tmp_path, compiler="no-such-compiler")
    for run, bits, group in ((native, 8, 128), (native, 8, GROUP), (native, 4, 64), (without, 4, GROUP)):
        expected = quantize(matrix, bits, group)
        assert all(torch.equal(a, b) for a, b in zip(run(matrix, bits, group), expected, strict=True))


def test_only_the_cpp_backend_builds_it() -> None:
    assert isinstance(quantizer("cpp"), NativeQuantize)
    assert quantizer("triton") is quantizer("reference") is quantize
