"""Confidence intervals by the percentile bootstrap (Efron 1979)."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Aggregates(Protocol):
    """Computes values of any set of examples, such as a `RowMetric`."""

    def aggregate(self, rows: np.ndarray) -> dict[str, float]:
        """Values of the examples with these rows of numbers."""
        ...


def bootstrap_intervals(
    metric: Aggregates, rows: np.ndarray, num_resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Interval of every value of a metric under resampling of the examples.

    Args:
        metric: aggregates rows.
        rows: `(examples, statistics)`, the metric's `row_statistics`.
        num_resamples: sets of examples drawn with replacement.
        level: share of the resamples inside the interval.
        seed: seed of the draws; the same seed gives the same intervals.

    Returns:
        `(low, high)` for each value; values that are undefined in some resamples are computed over the others, and left
        out if undefined in all. Empty for a single example, whose resamples are all the same.

    Raises:
        ValueError: `num_resamples` is below 1, or `level` is not between 0 and 1.
    """
    if num_resamples < 1 or not 0 < level < 1:
        raise ValueError(f"num_resamples={num_resamples} must be at least 1 and level={level} between 0 and 1")
    if len(rows) < 2:
        return {}
    rng = np.random.default_rng(seed)
    draws = [metric.aggregate(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(num_resamples)]
    intervals = {}
    for name in draws[0]:
        values = np.array([draw[name] for draw in draws])  # (resamples,)
        if not np.isnan(values).all():
            low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
            intervals[name] = (float(low), float(high))
    return intervals
