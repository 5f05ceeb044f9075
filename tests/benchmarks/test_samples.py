"""Statistics of samples."""

from __future__ import annotations

import pytest

from benchmarks.samples import Spread, pair_ratios


def test_median_and_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(2.0, 3.0, 4.0)


def test_one_sample_is_its_own_spread() -> None:
    assert Spread.of([2.5]) == Spread(2.5, 2.5, 2.5)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Spread.of([])


def test_a_drift_that_hits_both_sides_leaves_the_ratio_alone() -> None:
    """The machine halves its speed twice; each pair still says 3, while the ratio of medians would be off by then."""
    ours, theirs = [1.0, 2.0, 4.0], [3.0, 6.0, 12.0]
    assert pair_ratios(theirs, ours) == (3.0, 3.0, 3.0)


def test_samples_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pair_ratios([1.0, 2.0], [1.0])
