"""Means, confidence intervals, and paired comparisons of checkpoints."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import scipy  # which imports its slow parts when they are used

from spo_ray.runtime.map_rows import Row

Z95 = 1.959963984540054
"""97.5% quantile of the standard normal distribution."""
LEVEL = 0.05
"""Differences with an adjusted p-value from this on are called noise."""
RESAMPLES = 9999
CHUNK = 2**22
"""Numbers that a resampling test holds in memory at once."""
ROUNDING = 1e-9
"""Values whose relative difference is below this count as equal."""


class Interval(NamedTuple):
    """A 95% interval and the name of its method; all None if the values say nothing about their spread."""

    low: float | None = None
    high: float | None = None
    method: str | None = None


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation; the latter is None for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a proportion.

    Raises:
        ValueError: ``n`` is not positive.
    """
    interval = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def share(value: float, n: int) -> dict[str, float]:
    """Return a share of ``n`` observations with its Wilson interval."""
    low, high = wilson(round(value * n), n)
    return {"value": value, "low": low, "high": high, "n": n}


def paired_bootstrap(differences: Sequence[float], seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """Return the 95% percentile bootstrap interval of the mean of per-item differences; None twice if all are equal."""
    values = np.asarray(differences, dtype=float)
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return None, None
    options = _resampling(len(values), seed)
    interval = scipy.stats.bootstrap((values,), np.mean, method="percentile", **options).confidence_interval
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float], over: str, *, shares: bool = False) -> Interval:
    """Return the 95% bootstrap interval of the mean of independent values.

    Args:
        values: one for each item. Equal values have no interval.
        over: what the items are, for the interval's name.
        shares: the values lie in [0, 1]. If all are 0, or all are 1, the interval is Wilson's.
    """
    if shares and set(values) in ({0}, {1}):
        return Interval(*wilson(int(sum(values)), len(values)), "wilson")
    low, high = paired_bootstrap(values)
    return Interval(low, high, None if low is None else f"bootstrap over {over}")


def mcnemar(wins: int, losses: int) -> float:
    """Return the p-value of the exact two-sided McNemar test (Psychometrika 12, 1947).

    ``wins`` and ``losses`` are the numbers of items on which only the first or only the second is right.
    """
    return float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p-value of a permutation test that swaps the two sides of each item at random."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not values.any():
        return 1.0

    def statistic(x: Any, y: Any, axis: int) -> Any:
        return (x - y).mean(axis=axis)

    options = _resampling(len(values), seed)
    test = scipy.stats.permutation_test(
        (values, -values), statistic, permutation_type="samples", vectorized=True, **options
    )
    return float(test.pvalue)


def _resampling(n: int, seed: int) -> dict[str, Any]:
    return {"n_resamples": RESAMPLES, "batch": max(1, CHUNK // n), "rng": np.random.default_rng(seed)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values; Holm, Scandinavian Journal of Statistics 6, 1979."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def compare(metric: str, items: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Compare every two checkpoints on the items that both have (:class:`spo_ray.runtime.schema.Comparison`).

    ``items`` maps checkpoint and item to a value. Values that are all 0 or 1 are compared by McNemar's test, others by
    sign-flip permutation; p-values are adjusted by Holm's method.
    """
    rows: list[Row] = []
    binary = all(value in (0, 1) for values in items.values() for value in values.values())
    for first, second in combinations(items, 2):
        differences = [items[first][i] - items[second][i] for i in items[first] if i in items[second]]
        if not differences:
            continue
        wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        low, high = paired_bootstrap(differences)
        p_value = mcnemar(wins, losses) if binary else sign_flip(differences)
        test = "exact McNemar" if binary else "sign-flip permutation"
        row: Row = {"metric": metric, "first": first, "second": second, "difference": float(np.mean(differences))}
        row |= {"low": low, "high": high, "p_value": p_value, "test": test, "wins": wins, "losses": losses}
        rows.append(row | {"n": len(differences)})
    adjusted = holm([row["p_value"] for row in rows])
    return [row | {"p_adjusted": p_value} for row, p_value in zip(rows, adjusted, strict=True)]


def in_words(row: Mapping[str, Any]) -> str:
    """Return the result of a comparison as a sentence."""
    if row["p_adjusted"] >= LEVEL:
        return f"{row['first']} and {row['second']}: this difference is not distinguishable from noise"
    better, worse = (row["first"], row["second"]) if row["difference"] > 0 else (row["second"], row["first"])
    return f"{better} is better than {worse}"
