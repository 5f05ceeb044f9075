"""Distances between models, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.distances import kl_divergence, ranks, spearman, surprise


def test_kl_divergence_by_hand() -> None:
    """Half and half against a quarter and three quarters: ½ ln 2 + ½ ln ⅔."""
    half = torch.tensor([0.5, 0.5]).log()
    quarter = torch.tensor([0.25, 0.75]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(kl_divergence(half, quarter)) == pytest.approx(expected, rel=1e-6)
    other_way = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(kl_divergence(quarter, half)) == pytest.approx(other_way, rel=1e-6)


def test_kl_divergence_of_what_hardly_differs_is_small_and_positive() -> None:
    logits = torch.randn(4, 1000)
    found = kl_divergence(logits.log_softmax(-1), (logits + 1e-4 * torch.randn(4, 1000)).log_softmax(-1))
    assert (found > 0).all()
    assert (found < 2e-8).all()


def test_kl_divergence_of_equals_is_nothing() -> None:
    same = torch.randn(3, 50).log_softmax(-1)
    assert torch.equal(kl_divergence(same, same), torch.zeros(3))


def test_surprise_is_that_of_the_target() -> None:
    log_probs = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    found = surprise(log_probs, torch.tensor([1, 0]))
    torch.testing.assert_close(found, torch.tensor([math.log(2), math.log(4)]))


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert ranks(torch.tensor([30.0, 10.0, 20.0, 20.0])).tolist() == [4.0, 1.0, 2.5, 2.5]


def test_spearman_by_hand() -> None:
    """Without ties it is 1 - 6 Σd² / n(n² - 1); here the ranks differ by 1, 1, 0, 1, 1."""
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([2.0, 1.0, 3.0, 50.0, 4.0])
    assert spearman(a, b) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)


def test_spearman_with_ties_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5."""
    found = spearman(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))
