"""Weights are bound without second copies, and the model that went in does not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tilewright as tw
from tests.compiler.models import tiny


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "bert"])
def test_the_model_is_unchanged(name: str) -> None:
    """Compiling must leave outputs bit for bit, parameters by name, their values, and the class as they were."""
    model = tiny(name)
    ids = torch.randint(3, 100, (2, 7))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids)[0]
        tw.compile(model, batch_sizes=(2,), max_length=64, backend="reference")
        assert torch.equal(model(ids)[0], expected)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_merged_matrices_are_held_once() -> None:
    """q, k and v become views of one buffer: their storage is shared, and no copy is counted."""
    model = tiny("llama")
    fast = tw.compile(model, max_length=64, backend="reference")
    attention: Any = model.model.layers[0].self_attn
    storages = {
        p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert len(storages) == 1
    assert fast.report().memory.prepared == 0


def test_compiling_twice_shares_the_merged_buffer() -> None:
    """A second compilation finds the parameters joined already and must not move them: the first still reads them."""
    model = tiny("gpt2")
    first = tw.compile(model, max_length=64, backend="reference")
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    tw.compile(model, max_length=32, backend="reference")
    assert where == {name: p.data_ptr() for name, p in model.named_parameters()}
    ids = torch.randint(3, 100, (1, 5))
    with torch.no_grad():
        torch.testing.assert_close(first(ids).logits, model(ids).logits)


def test_updates_in_place_reach_the_compiled_model() -> None:
    """Weights are shared, so loading others into the model shows in the compiled one."""
    model = tiny("llama")
    fast = tw.compile(model, max_length=64, backend="reference")
    ids = torch.randint(3, 100, (1, 5))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
        torch.testing.assert_close(fast(ids).logits, model(ids).logits)


class _Halves(torch.nn.Module):
    """One parameter whose parts are matrices of their own, as those of nn.MultiheadAttention are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(24, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        linear = torch.nn.functional.linear
        return linear(x, self.weight[:8]), linear(x, self.weight[8:])


def test_parts_of_a_matrix_are_no_matrices_to_move() -> None:
    model = _Halves().eval()
    before, x = model.weight.detach().clone(), torch.randn(3, 8)
    fast = tw.compile(model, (torch.randn(2, 8),), backend="reference")
    assert torch.equal(model.weight, before)
    with torch.no_grad():
        for got, expected in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(got, expected)
