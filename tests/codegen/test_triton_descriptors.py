"""Which factors of products TMA copies, and what a launch hands to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sympy import Integer

from tests.strategies import examples
from tilewright.codegen.triton.descriptors import advances_by_one
from tilewright.codegen.triton.device import A100, H100, Device
from tilewright.ir.index import FloorDiv, Mod, sym
from tilewright.runtime.kernels import Kernels
from tilewright.runtime.step_times import wall_seconds

from .triton_cases import CASES
from .triton_run import load, source_of

TILE = {"block_m": 64, "block_n": 16, "block_k": 32, "descriptors": 1}
X, W = ("p_x", (64, 32)), ("p_w", (16, 32))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("matrix-bf16-many", {}, {X, W}),
        ("matrix-bf16-many", {"descriptors": 0}, set()),
        ("matrix-f32-many", {"block_k": 512}, set()),  # more than 256 along a side
        ("matrix_gated-bf16-many", {}, {W}),  # the row operand is computed
        ("matrix_heads-bf16-many", {}, {W}),  # the row operand is reduced too
        ("matrix_parts-bf16-many-64", {}, {X, W}),
        ("matrix_parts-bf16-many-144", {}, set()),  # a block would reach into the next part
        ("linear-bf16-many", {}, set()),  # rows of 140 bytes
        ("linear-bf16-one", {}, set()),  # no product on tensor cores
        ("quantized-int8-rows-many", {}, set()),
    ],
)
def test_plain_matrices_are_described(
    name: str, changes: Mapping[str, int], expected: set[tuple[str, tuple[int, int]]]
) -> None:
    assert _described(name, TILE | changes) == expected


def test_halves_of_heads_are_described_in_blocks_that_divide_them() -> None:
    """Heads of 32: blocks of 16 rows lie within a half; of 32, only those of v, which is not turned, are plain."""
    kernel, text = source_of(CASES["matrix_heads-bf16-four"](), False, TILE | {"block_m": 16})
    assert [d.block for d in kernel.descriptors] == [(16, 32)]
    assert text.count(".load([") == 5
    _, text = source_of(CASES["matrix_heads-bf16-four"](), False, TILE | {"block_m": 16, "block_n": 32})
    assert text.count(".load([") == 1


def test_only_hopper_has_descriptors() -> None:
    assert _described("matrix-bf16-many", TILE, A100) == set()


@examples(200)
@given(
    size=st.sampled_from([2, 4, 8, 16]),
    half=st.sampled_from([1, 2, 4, 6, 8, 12, 16]),
    stride=st.sampled_from([1, 2, 3]),
    start=st.sampled_from([0, 5]),
)
def test_a_block_is_plain_only_where_its_rows_follow_each_other(
    size: int, half: int, stride: int, start: int
) -> None:
    """Rows of halves of heads, against all rows of many blocks. What cannot be proved may be denied."""
    n = sym("n")
    row = stride * half * FloorDiv(n, Integer(half)) + Mod(n, Integer(half)) + start
    rows = [int(row.subs(n, i)) for i in range(16 * half)]
    blocks = [rows[i : i + size] for i in range(0, len(rows), size)]
    plain = all(b == list(range(b[0], b[0] + len(b))) for b in blocks)
    found = advances_by_one(row, n, size, {n: Integer(16 * half)})
    assert found <= plain
    if half % size == 0:
        assert found


def test_a_launch_describes_the_tensors_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices by the sizes of this call, at the addresses of the pointers, in blocks of the tile."""
    case = CASES["matrix-bf16-many"]()
    _, text = source_of(case, False, TILE)
    module = load(text, tmp_path / "case.py")
    launched = _Recorder()
    monkeypatch.setattr(module, "fused", launched)
    pointers = [torch.zeros(2 * 19 * 90, dtype=torch.bfloat16) for _ in range(5)]
    module.LAUNCH["fused"](pointers, case.dims)
    x, w = launched.arguments[-2:]
    assert (x.base, x.shape, x.strides, x.block_shape) == (pointers[0], [38, 72], [72, 1], [64, 32])
    assert (w.base, w.shape, w.strides, w.block_shape) == (pointers[1], [90, 72], [72, 1], [16, 32])


def test_a_tensor_that_tma_cannot_copy_is_refused_and_a_tuner_passes_it_over(tmp_path: Path) -> None:
    case = CASES["matrix-bf16-many"]()
    path = tmp_path / "case.py"
    module = load(source_of(case, False, TILE)[1], path)
    odd = torch.zeros(90 * 72 + 1, dtype=torch.bfloat16)[1:]
    with pytest.raises(AssertionError, match="16-byte aligned"):
        module.LAUNCH["fused"]([odd] * 5, case.dims)
    launch = partial(Kernels(path).try_launch, "fused", [odd] * 5, case.dims)
    with pytest.warns(UserWarning, match="16-byte aligned"):
        assert wall_seconds([("fused", launch)]) == [math.inf]


class _Recorder:
    """Stands for a kernel, and keeps what it was launched with."""

    def __getitem__(self, grid: tuple[int, ...]) -> _Recorder:
        self.grid = grid
        return self

    def __call__(self, *arguments: Any, **_options: object) -> None:
        self.arguments = arguments


def test_no_more_programs_than_tiles_where_their_number_is_known(tmp_path: Path) -> None:
    """Four rows and 90 columns in blocks of 16 are six tiles; a prompt's number of tiles is known at run time."""
    for name, walkers, expected in (
        ("matrix-bf16-four", 4, 4),
        ("matrix-bf16-four", 132, 6),
        ("matrix-bf16-many", 132, 132),
    ):
        kernel, _ = source_of(CASES[name](), False, TILE | {"persistent": walkers})
        assert kernel.programs == expected


def _described(name: str, tile: Mapping[str, int], device: Device = H100) -> set[tuple[str, tuple[int, int]]]:
    kernel, _ = source_of(CASES[name](), False, tile, device)
    return {(d.pointer, d.block) for d in kernel.descriptors}
