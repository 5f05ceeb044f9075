"""What a model may return and what callers may pass: heads without a row per token, and indices beyond a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import tilewright as tw

from .models import tiny

CONFIG = LlamaConfig(
    vocab_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    hidden_size=64,
    intermediate_size=96,
    num_key_value_heads=2,
    max_position_embeddings=256,
    num_labels=8,
    pad_token_id=0,
)


@pytest.mark.parametrize(
    ("head", "shapes"),
    [(LlamaForSequenceClassification, r"\[B, 8\]"), (LlamaForQuestionAnswering, r"\[B, S\], \[B, S\]")],
)
def test_decoders_without_one_row_per_token_are_refused(head: Any, shapes: str) -> None:
    with pytest.raises(tw.CaptureError, match=f"returns {shapes}, .*base_model"):
        tw.compile(head(CONFIG).eval(), max_length=64, backend="reference")


def test_a_head_with_a_row_per_token_is_a_decoder() -> None:
    model = LlamaForTokenClassification(CONFIG).eval()
    fast = tw.compile(model, max_length=64, backend="reference")
    ids = torch.randint(1, 128, (1, 7))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(fast(ids).logits, expected, rtol=1e-4, atol=1e-5)


# Indices


def test_token_types_beyond_the_table_are_refused() -> None:
    fast = tw.compile(tiny("bert", layers=1), max_length=64, backend="reference")
    ids = torch.randint(1, 128, (2, 7))
    fast(ids, token_type_ids=torch.ones_like(ids))
    for value in (900, 2, -1):
        with pytest.raises(tw.InputError, match=rf"token_type_ids holds {value}, .*table of 2 entries"):
            fast(ids, token_type_ids=torch.full_like(ids, value))


class _Tables(nn.Module):
    """Looks up by embedding, by indexing (where negative indices count from the end), and by a part of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        looked_up = nn.functional.embedding(a.unsqueeze(-1), self.table)[:, 0]
        return looked_up + self.table[b] + self.table[c + 5] + self.table[d[:, 0]]


def test_bounds_of_direct_and_computed_indices() -> None:
    model = _Tables().eval()
    one, pair = torch.tensor([1, 2, 3]), torch.tensor([[1, 99], [2, 99], [3, 99]])
    fast = tw.compile(model, example_inputs=(one, one, one, pair), backend="reference")
    last = torch.full((3,), 8)
    torch.testing.assert_close(fast(last, -last - 1, one, pair), model(last, -last - 1, one, pair))
    for bad, name, value in (
        ((last + 1, one), "a", 9),
        ((-one, one), "a", -3),
        ((one, last + 1), "b", 9),
        ((one, -last - 2), "b", -10),
    ):
        with pytest.raises(tw.InputError, match=f"{name} holds {value}, .*table of 9 entries"):
            fast(*bad, one, pair)


# Other arguments


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "token_type_ids"])
def test_arguments_that_are_no_tensors(name: str) -> None:
    family = "bert" if name == "token_type_ids" else "llama"
    fast = tw.compile(tiny(family, layers=1), max_length=64, backend="reference")
    ids = torch.tensor([[1, 2, 3]])
    for value in ([[1, 1, 1]], (1, 1, 1), "111"):
        with pytest.raises(tw.InputError, match=f"{name} must be a tensor, got"):
            fast(ids, **{name: value})
    if family == "llama":
        with pytest.raises(tw.InputError, match=f"{name} must be a tensor, got list"):
            fast.generate(ids, max_new_tokens=2, **{name: [[1, 1, 1]]})


class _Returns(nn.Module):
    def __init__(self, *extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        first, *rest = self.extra
        return (first, x * 2, *rest)


@pytest.mark.parametrize("extra", [(None,), (3, None), (None, "text", 1.5)])
def test_results_that_are_no_tensors(extra: tuple[Any, ...]) -> None:
    model, x = _Returns(*extra).eval(), torch.randn(3, 4)
    fast = tw.compile(model, example_inputs=(x,), backend="reference")
    result = fast(x)
    torch.testing.assert_close(result[1], x * 2)
    assert (result[0], *result[2:]) == extra


def test_sizes_that_are_returned_follow_the_input() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x * 2, 2 * x.shape[0]

    x = torch.randn(3, 4)
    fast = tw.compile(Sized().eval(), example_inputs=(x,), backend="reference")
    assert [fast(x[:n])[1] for n in (3, 2, 1)] == [6, 4, 2]


class _Subtract(nn.Module):
    def forward(self, x: Any, x_0: Tensor) -> Tensor:
        return x[0] - 2 * x[1] + 4 * x_0


def test_names_that_would_collide() -> None:
    model, (a, b, c) = _Subtract().eval(), torch.randn(3, 2, 5)
    for example in (((a, b), c), {"x": (a, b), "x_0": c}, {"x_0": c, "x": (a, b)}):
        fast = tw.compile(model, example_inputs=example, backend="reference")
        torch.testing.assert_close(fast((a, b), c), model((a, b), c))
        torch.testing.assert_close(fast(x_0=c, x=(a, b)), model((a, b), c))
