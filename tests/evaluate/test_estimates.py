import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from spo_ray.data.grade import pass_at_k
from spo_ray.evaluate.statistics import mean_std, wilson


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, data):
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    graded = [i < correct for i in range(n)]
    subsets = [any(s) for s in itertools.combinations(graded, k)]
    assert pass_at_k(n, correct, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="at least 4"):
        pass_at_k(3, 1, 4)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (160, 320), (320, 320)])
def test_wilson_matches_scipy(successes, n):
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_mean_and_standard_deviation():
    assert mean_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_std([4.0]) == (4.0, None)
