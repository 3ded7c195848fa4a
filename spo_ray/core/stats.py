"""Estimates and intervals."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of pass@k from ``n`` samples; Chen et al., arXiv 2107.03374, equation 1.

    Raises:
        ValueError: fewer than ``k`` samples.
    """
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


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
