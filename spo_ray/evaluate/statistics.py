"""Estimates, confidence intervals and paired comparisons."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from spo_ray.runtime.map_rows import Row

Z95 = 1.959963984540054


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion; Wilson, JASA 22, 1927.

    Raises:
        ValueError: ``n`` is not positive.
    """
    if n <= 0:
        raise ValueError("an interval needs at least one observation")
    p, z, z2 = successes / n, Z95, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def share(value: float, n: int) -> dict[str, float]:
    """A share of ``n`` observations, with its 95% interval."""
    low, high = wilson(round(value * n), n)
    return {"value": value, "low": low, "high": high, "n": n}


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


RESAMPLES = 9999
LEVEL = 0.05
"""A larger adjusted p-value is called noise."""
ROUNDING = 1e-9
"""Relative differences below this are none."""
CHUNK = 2**22
"""Numbers that a bootstrap holds at once."""


class Interval(NamedTuple):
    """95% bounds and how they were made; three times None where nothing is known of the spread."""

    low: float | None = None
    high: float | None = None
    method: str | None = None


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided McNemar test: the p-value of so many items on which only one of two is right.

    McNemar, Psychometrika 12, 1947, with the binomial distribution.
    """
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def paired_bootstrap(differences: Sequence[float], seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """95% percentile interval of the mean of per-item differences; none where all are equal.

    Resampling knows nothing of values that did not come up.
    """
    values = np.asarray(differences, dtype=float)
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return None, None
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, CHUNK // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def mean_interval(values: Sequence[float], over: str, *, shares: bool = False) -> Interval:
    """95% interval of the mean of independent values, by bootstrap.

    Args:
        values: one for each item; of equal ones nothing can be told by resampling.
        over: what the items are, for the interval's name.
        shares: values are between 0 and 1 by their nature. Where all are 0, or all are 1, the interval is Wilson's: a
            hundred times 0 is not certainly 0.
    """
    if shares and set(values) in ({0}, {1}):
        return Interval(*wilson(int(sum(values)), len(values)), "wilson")
    low, high = paired_bootstrap(values)
    return Interval(low, high, None if low is None else f"bootstrap over {over}")


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of per-item differences by exchanging the two sides of each item at random."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not values.any():
        return 1.0
    found = stats.permutation_test(
        (values, -values),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, CHUNK // len(values)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def compare(metric: str, items: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Every two checkpoints on the items that both have (:class:`spo_ray.runtime.schema.Comparison`).

    ``items`` holds each checkpoint's value for each item. Values that are all 0 or 1 are compared by McNemar's test,
    others by sign-flip permutation; p-values are adjusted by Holm's method.
    """
    found: list[Row] = []
    binary = all(value in (0, 1) for values in items.values() for value in values.values())
    for first, second in combinations(items, 2):
        shared = [i for i in items[first] if i in items[second]]
        differences = [items[first][i] - items[second][i] for i in shared]
        if not shared:
            continue
        wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        low, high = paired_bootstrap(differences)
        found.append(
            {
                "metric": metric,
                "first": first,
                "second": second,
                "difference": float(np.mean(differences)),
                "low": low,
                "high": high,
                "p_value": mcnemar(wins, losses) if binary else sign_flip(differences),
                "test": "exact McNemar" if binary else "sign-flip permutation",
                "wins": wins,
                "losses": losses,
                "n": len(shared),
            }
        )
    for row, adjusted in zip(found, holm([row["p_value"] for row in found]), strict=True):
        row["p_adjusted"] = adjusted
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values; Holm, Scandinavian Journal of Statistics 6, 1979."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def in_words(row: Mapping[str, Any]) -> str:
    """What a comparison says."""
    if row["p_adjusted"] >= LEVEL:
        return f"{row['first']} and {row['second']}: this difference is not distinguishable from noise"
    better, worse = (row["first"], row["second"]) if row["difference"] > 0 else (row["second"], row["first"])
    return f"{better} is better than {worse}"
