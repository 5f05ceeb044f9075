"""Splitting products over K: only where it fills the GPU better, and without a change of meaning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import examples
from tilewright.ir.module import Module
from tilewright.ir.parser import parse_module
from tilewright.ir.reference import evaluate
from tilewright.passes import split_products as pass_module
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import run_passes
from tilewright.passes.split_products import SHORTEST, TILE, parts_of, split_products

OPTIONS = PassOptions(fixed=(("S", 1),), multiprocessors=132)
TEXT = """
entry @main

func @main(%x: bf16[8, 4, 64], %w: bf16[32, 64], %r: bf16[8, 4, 32]) -> (%z) {
  %y = matmul %x, %w : bf16[8, 4, 32]
  %z = add %y, %r : bf16[8, 4, 32]
}
"""


@examples(100)
@given(
    rows=st.sampled_from([1, 16, 32, 64]),
    columns=st.integers(1, 40000),
    k=st.integers(1, 600).map(lambda n: 32 * n),
    processors=st.sampled_from([84, 108, 132]),
)
def test_parts_divide_k_and_stay_long(rows: int, columns: int, k: int, processors: int) -> None:
    parts = parts_of(rows, columns, k, processors)
    assert k % parts == 0
    assert parts == 1 or (k // parts >= SHORTEST and (k // parts) % TILE == 0 and rows >= 32)
    assert parts == 1 or parts * -(-columns // TILE) <= 2.5 * processors


def test_the_down_projection_of_a_batch_is_split_and_of_one_row_is_not() -> None:
    assert parts_of(64, 4096, 11008, 132) == 4
    assert parts_of(16, 4096, 11008, 132) == 1
    assert parts_of(64, 32000, 4096, 132) == 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Module:
    """A module small enough to evaluate, and limits that have it split."""
    monkeypatch.setattr(pass_module, "SHORTEST", 16)
    monkeypatch.setattr(pass_module, "TILE", 16)
    return parse_module(TEXT)


def test_meaning_stays(small: Module) -> None:
    """The same sums, and in bfloat16 no further from the exact ones than a whole product is."""
    split = split_products(small, OPTIONS)
    assert [op.opcode for op in split.main.ops][:4] == ["view", "view", "matmul", "reduce"]
    torch.manual_seed(0)
    given = {
        "x": torch.randn(8, 4, 64).bfloat16(),
        "w": torch.randn(32, 64).bfloat16(),
        "r": torch.randn(8, 4, 32).bfloat16(),
    }
    (exact,) = evaluate(small, given, {}, {}, exact=True)
    (again,) = evaluate(split, given, {}, {}, exact=True)
    torch.testing.assert_close(again, exact, rtol=1e-12, atol=1e-12)
    (whole,), (parts,) = (evaluate(m, given, {}, {}) for m in (small, split))
    assert (parts.double() - exact).abs().max() <= 1.5 * (whole.double() - exact).abs().max()


def test_the_sum_of_parts_is_one_kernel_with_what_follows(small: Module) -> None:
    fused = run_passes(small, OPTIONS)
    kernels = [[o.opcode for o in op.body if o.opcode != "view"] for op in fused.main.ops]
    assert kernels == [["matmul"], ["reduce", "cast", "add"]]


def test_other_programs_are_left_whole(small: Module) -> None:
    assert split_products(small, PassOptions(multiprocessors=132)) is small
    assert split_products(small, PassOptions(fixed=(("S", 1),))) is small
