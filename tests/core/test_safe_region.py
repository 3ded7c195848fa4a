import json
import math

import pytest

from spo_ray.core.safe_region import DualVariable


def descend(dual, slope, gap, gap_slope, x, rate=0.02, steps=6000):
    """Alternating steps: x down the Lagrangian f(x) + lambda * gap(x), lambda up."""
    for _ in range(steps):
        x -= rate * (slope(x) + dual.value * gap_slope(x))
        dual.update(gap(x))
    return x


def pull_to(a, dual, b=0.0, x=0.0):
    """minimise 0.5 * (x - a)^2  s.t.  x - b <= epsilon."""
    return descend(dual, lambda x: x - a, lambda x: x - b, lambda x: 1.0, x)


@pytest.mark.parametrize("start", [0.001, 2.0, 50.0])
@pytest.mark.parametrize(("a", "b"), [(3.0, 1.0), (0.5, -2.0), (10.0, 9.5)])
def test_multiplier_and_point_of_a_quadratic_under_a_bound(a, b, start):
    dual = DualVariable(value=start, epsilon=0.0, learning_rate=0.02)
    x = pull_to(a, dual, b)
    assert dual.value == pytest.approx(a - b, abs=1e-3)
    assert x == pytest.approx(b, abs=1e-3)


def test_epsilon_moves_the_bound():
    dual = DualVariable(value=1.0, epsilon=0.75, learning_rate=0.02)
    x = pull_to(3.0, dual, b=1.0)
    assert dual.value == pytest.approx(1.25, abs=1e-3)
    assert x == pytest.approx(1.75, abs=1e-3)


def test_multiplier_of_a_curved_constraint():
    # minimise x^2  s.t.  -log x <= 0.5: x = exp(-0.5), and 2 x = lambda / x there.
    dual = DualVariable(value=0.1, epsilon=0.5, learning_rate=0.02)
    x = descend(dual, lambda x: 2 * x, lambda x: -math.log(x), lambda x: -1 / x, x=1.0)
    assert x == pytest.approx(math.exp(-0.5), abs=1e-3)
    assert dual.value == pytest.approx(2 / math.e, abs=1e-3)


def test_inactive_constraint_lets_lambda_fall_to_the_lowest():
    dual = DualVariable(value=5.0, epsilon=0.0, learning_rate=0.02, lowest=0.01)
    x = pull_to(1.0, dual, b=2.0)
    assert dual.value == 0.01
    assert x == pytest.approx(1.0 - 0.01, abs=1e-6)


def test_lambda_recovers_from_the_lowest_when_the_constraint_becomes_active():
    dual = DualVariable(value=5.0, epsilon=0.0, learning_rate=0.02)
    x = pull_to(1.0, dual, b=2.0)
    assert dual.value == dual.lowest
    assert pull_to(4.0, dual, b=2.0, x=x) == pytest.approx(2.0, abs=1e-3)
    assert dual.value == pytest.approx(2.0, abs=1e-3)


def test_lambda_is_clipped_at_the_highest_and_the_gap_stays_open():
    dual = DualVariable(value=0.5, epsilon=0.0, learning_rate=0.02, highest=1.5)
    x = pull_to(3.0, dual, b=1.0)
    assert dual.value == 1.5
    assert x == pytest.approx(3.0 - 1.5, abs=1e-6)


def test_one_step_is_rate_times_violation():
    dual = DualVariable(value=1.0, epsilon=0.5, learning_rate=0.1)
    assert dual.update(2.5) == pytest.approx(1.2)
    assert dual.update(-0.5) == pytest.approx(1.1)
    assert dual.update(0.5) == dual.value == pytest.approx(1.1)


@pytest.mark.parametrize(("gap", "end"), [(1e9, 4.0), (math.inf, 4.0), (-1e9, 0.2), (-math.inf, 0.2)])
def test_one_huge_gap_stops_at_the_limits(gap, end):
    dual = DualVariable(value=1.0, epsilon=0.5, learning_rate=0.1, lowest=0.2, highest=4.0)
    assert dual.update(gap) == end


def test_without_a_learning_rate_it_is_a_fixed_penalty():
    dual = DualVariable(value=1.0, epsilon=0.5, learning_rate=0.0)
    assert [dual.update(gap) for gap in (3.0, -3.0)] == [1.0, 1.0]


def test_state_dict_continues_identically_through_json():
    gaps = [math.sin(i) + 0.3 for i in range(40)]
    straight, before, resumed = (DualVariable(value=1.0, epsilon=0.1, learning_rate=0.07) for _ in range(3))
    expected = [straight.update(gap) for gap in gaps]
    for gap in gaps[:15]:
        before.update(gap)
    resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert [resumed.update(gap) for gap in gaps[15:]] == expected[15:]


def test_a_gap_that_is_no_number_changes_nothing():
    assert DualVariable(5.0, epsilon=0.0, learning_rate=1.0).update(float("nan")) == 5.0
