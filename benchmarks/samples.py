"""What a handful of noisy samples says: medians, quartiles, and ratios taken pair by pair."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation between samples. Raises ValueError for no samples."""
        if not samples:
            raise ValueError("no samples")
        if len(samples) == 1:
            return Spread(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Spread(low, median, high)


def pair_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, ...]:
    """The ratio of each pair of neighbours in time.

    A machine whose speed drifts hits both of a pair alike, so the median of these is steadier than the ratio of two
    medians. Raises ValueError when the samples do not pair up.
    """
    return tuple(a / b for a, b in zip(numerators, denominators, strict=True))
