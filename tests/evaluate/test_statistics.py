"""Intervals by simulation, p-values and pass@k by counting."""

import random
from itertools import combinations, product
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_ray.data.grade import pass_at_k
from spo_ray.evaluate.statistics import (
    Z95,
    compare,
    holm,
    in_words,
    mcnemar,
    mean_interval,
    mean_std,
    paired_bootstrap,
    sign_flip,
    wilson,
)


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, data):
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    graded = [i < correct for i in range(n)]
    subsets = [any(s) for s in combinations(graded, k)]
    assert pass_at_k(n, correct, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="at least 4"):
        pass_at_k(3, 1, 4)


def test_mean_and_standard_deviation():
    assert mean_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_std([4.0]) == (4.0, None)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (160, 320), (320, 320)])
def test_wilson_bounds_are_the_proportions_that_a_score_test_just_accepts(successes, n):
    """Wilson, JASA 22, 1927: where the observed share is 1.96 standard errors away."""
    z = NormalDist().inv_cdf(0.975)
    assert pytest.approx(z, abs=1e-12) == Z95
    low, high = wilson(successes, n)
    for bound, distance in ((low, successes / n - low), (high, high - successes / n)):
        assert distance == pytest.approx(z * sqrt(bound * (1 - bound) / n), abs=1e-12)
    assert 0 <= low < high <= 1
    with pytest.raises(ValueError, match="n must be"):
        wilson(0, 0)


@pytest.mark.parametrize(("p", "n"), [(0.05, 320), (0.5, 60), (0.8, 320), (0.99, 320)])
def test_wilson_intervals_cover_the_truth(p, n):
    """Exactly: the chance of every count, where its interval holds p."""
    covered = sum(
        comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1]
    )
    assert 0.925 < covered < 0.985


def interval_of_shares(values):
    return mean_interval(values, "items", shares=True)[:2]


@pytest.mark.parametrize("interval", [interval_of_shares, paired_bootstrap])
def test_intervals_of_means_cover_the_truth_in_simulations(interval):
    """Differences of right and wrong answers, with the mean -0.1."""
    rng, hits, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        low, high = interval(rng.choice([-1.0, 0.0, 1.0], size=80, p=[0.25, 0.6, 0.15]).tolist())
        hits += low <= -0.1 <= high
    assert 0.92 < hits / runs < 0.98


def test_means_of_equal_values_are_not_certain():
    for value in (0.0, 1.0):
        assert mean_interval([value] * 20, "items", shares=True) == (*wilson(int(20 * value), 20), "wilson")
        assert mean_interval([value] * 20, "items") == (None, None, None)  # lengths, for instance
    assert mean_interval([0.5] * 20, "items", shares=True) == (None, None, None)
    assert mean_interval([0.5], "items") == (None, None, None)
    assert mean_interval([0.0, 1.0] * 9, "items").method == "bootstrap over items"
    assert sign_flip([0.3]) == 1.0


@given(st.integers(0, 9), st.integers(0, 9))
def test_mcnemar_against_all_outcomes_of_fair_coins(wins, losses):
    """How often coins fall at least as unevenly."""
    n = wins + losses
    extreme = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(wins - losses))
    assert mcnemar(wins, losses) == pytest.approx(extreme / 2**n if n else 1.0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=2, max_size=9))
def test_the_permutation_test_against_all_exchanges(values):
    flips = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=len(values))
    ]
    expected = sum(flip >= abs(sum(values)) - 1e-12 for flip in flips) / len(flips)
    assert sign_flip(values) == pytest.approx(expected)


def test_p_values_are_uniform_where_there_is_no_difference():
    rng = random.Random(0)
    found = [sign_flip([rng.choice([-1.0, 0.0, 1.0]) for _ in range(60)], seed) for seed in range(200)]
    assert 0.01 < sum(p < 0.05 for p in found) / 200 < 0.1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_comparisons_pair_the_items_that_both_have():
    a = {str(i): 1.0 for i in range(20)}
    b = {str(i): float(i >= 9) for i in range(1, 21)}
    (row,) = compare("accuracy_greedy", {"a": a, "b": b})
    assert (row["n"], row["wins"], row["losses"], row["test"]) == (19, 8, 0, "exact McNemar")
    assert row["difference"] == pytest.approx(8 / 19)
    assert row["p_value"] == row["p_adjusted"] == pytest.approx(2 / 2**8)
    assert row["low"] < 8 / 19 < row["high"]
    assert in_words(row) == "a is better than b"
    assert in_words(row | {"difference": -0.4}) == "b is better than a"
    assert in_words(row | {"p_adjusted": 0.2}) == "a and b: this difference is not distinguishable from noise"


def test_graded_values_are_compared_by_permutation_and_adjusted_together():
    items = {name: {str(i): (i + shift) / 40 for i in range(12)} for name, shift in (("a", 0), ("b", 1), ("c", 1))}
    rows = compare("accuracy_sampled", items)
    assert [(row["first"], row["second"]) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert {row["test"] for row in rows} == {"sign-flip permutation"}
    assert rows[0]["p_value"] == pytest.approx(2 / 2**12)
    assert rows[0]["p_adjusted"] == pytest.approx(3 * 2 / 2**12)
    assert (rows[2]["p_value"], rows[2]["low"], rows[2]["high"]) == (1.0, None, None)
    assert (rows[0]["difference"], rows[0]["low"]) == (pytest.approx(-1 / 40), None)  # each item differs by the same
