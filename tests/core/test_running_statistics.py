import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from spo_ray.core.losses import PairLogps, alpha_dpo
from spo_ray.core.running_statistics import EPSILON, RunningStatistics


def stream(steps, pairs=4, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(0.3, 0.2, pairs) for _ in range(steps)]


def fed(statistics, batches):
    for batch in batches:
        statistics.update(torch.tensor(batch))
    return statistics


def moments(statistics):
    """Mean and spread, read off from the z-scores of 0 and 1."""
    low, high = statistics.zscore(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    return -low / (high - low), 1 / (high - low)


class TwoRanks:
    """A sum over two threads, in place."""

    def __init__(self):
        self.barrier, self.given = threading.Barrier(2, timeout=30), []

    def __call__(self, tensors):
        self.given.append([t.clone() for t in tensors])
        self.barrier.wait()
        for tensor, *parts in zip(tensors, *self.given, strict=True):
            tensor.copy_(sum(parts))
        if self.barrier.wait() == 0:
            self.given.clear()
        self.barrier.wait()

    def run(self, function, *arguments):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(function, *arguments))


def test_first_update_gives_the_batch_its_own_mean_and_population_spread():
    batch = np.array([0.1, 0.5, -0.4, 0.9])
    statistics = fed(RunningStatistics(), [batch])
    assert moments(statistics) == pytest.approx((batch.mean(), batch.std()), rel=1e-12)
    z = statistics.zscore(torch.tensor(batch))
    assert z.mean().item() == pytest.approx(0, abs=1e-12)
    assert z.square().mean().item() == pytest.approx(1)


def test_nothing_taken_in_gives_zero():
    assert RunningStatistics().zscore(torch.tensor([1.0, -2.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_moments_are_the_weighted_moments_of_all_batches(decay):
    batches, statistics = stream(40), RunningStatistics(decay)
    for n, batch in enumerate(batches, 1):
        statistics.update(torch.tensor(batch))
        weights = decay ** np.arange(n - 1, -1, -1)
        weights /= weights.sum()
        mean = weights @ [b.mean() for b in batches[:n]]
        spread = math.sqrt(weights @ [(b**2).mean() for b in batches[:n]] - mean**2)
        assert moments(statistics) == pytest.approx((mean, spread), rel=1e-9)


def test_statistics_converge_to_those_of_the_stream():
    statistics = fed(RunningStatistics(decay=0.99), stream(800, pairs=64))
    assert moments(statistics) == pytest.approx((0.3, 0.2), abs=0.01)


def test_statistics_follow_a_stream_that_moves():
    statistics = fed(RunningStatistics(), stream(50) + [b + 5 for b in stream(100, pairs=64)])
    assert moments(statistics) == pytest.approx((5.3, 0.2), abs=0.05)


def test_constant_stream_has_z_zero_and_the_smallest_spread():
    statistics = fed(RunningStatistics(), [np.full(4, 0.7)] * 30)
    z = statistics.zscore(torch.tensor([0.7, 0.7 + EPSILON, 0.7 - 3 * EPSILON], dtype=torch.float64))
    assert z.tolist() == pytest.approx([0, 1, -3], abs=1e-6)


def test_a_spread_below_epsilon_counts_as_epsilon_and_one_above_as_itself():
    for spread, counted in ((EPSILON / 10, EPSILON), (EPSILON * 10, EPSILON * 10), (0.0, EPSILON)):
        statistics = fed(RunningStatistics(), [np.array([-spread, spread])])
        assert statistics.zscore(torch.tensor([1.0])).item() == pytest.approx(1 / counted, rel=1e-6)


def test_batches_of_one_pair_give_a_spread_over_steps():
    values = stream(25, pairs=1)
    statistics = fed(RunningStatistics(), values[:1])
    assert statistics.zscore(torch.tensor(values[0])).item() == pytest.approx(0, abs=1e-9)
    fed(statistics, values[1:])
    x, weights = np.concatenate(values), 0.9 ** np.arange(24, -1, -1)
    mean = np.average(x, weights=weights)
    spread = math.sqrt(np.average((x - mean) ** 2, weights=weights))
    assert moments(statistics) == pytest.approx((mean, spread), rel=1e-9)


def test_zscore_keeps_the_dtype_and_does_not_move():
    statistics = fed(RunningStatistics(), stream(3))
    before = statistics.state_dict()
    assert statistics.zscore(torch.ones(2)).dtype == torch.float32
    assert statistics.state_dict() == before


def test_update_does_not_keep_or_change_its_values():
    values = torch.tensor([0.1, 0.4], requires_grad=True)
    statistics = RunningStatistics()
    statistics.update(values)
    assert values.tolist() == pytest.approx([0.1, 0.4])
    assert all(type(v) is float for v in statistics.state_dict().values())


def test_state_dict_continues_identically_through_json():
    batches = stream(20)
    straight, before = fed(RunningStatistics(), batches), fed(RunningStatistics(), batches[:8])
    resumed = RunningStatistics()
    resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
    fed(resumed, batches[8:])
    assert resumed.state_dict() == straight.state_dict()
    values = torch.tensor(batches[-1])
    assert torch.equal(resumed.zscore(values), straight.zscore(values))


@pytest.mark.parametrize("cut", [1, 2])
def test_two_ranks_equal_one_batch(cut):
    batches, ranks, alone = stream(6), (RunningStatistics(), RunningStatistics()), RunningStatistics()
    for batch in batches:
        alone.update(torch.tensor(batch))
        together = TwoRanks()
        together.run(lambda s, part, t=together: s.update(torch.tensor(part), t), ranks, (batch[:cut], batch[cut:]))
    assert ranks[0].state_dict() == ranks[1].state_dict()
    assert ranks[0].state_dict() == pytest.approx(alone.state_dict(), rel=1e-12)


def test_alpha_dpo_over_two_ranks_equals_one_batch():
    rng = torch.Generator().manual_seed(0)
    logps = [-30 * torch.rand(4, generator=rng, dtype=torch.float64) for _ in range(4)]
    lengths = [torch.tensor([5, 8, 13, 2]), torch.tensor([7, 3, 9, 9])]
    options = {"beta": 2.0, "margin": 0.3}

    def loss(part, all_reduce):
        columns = (column[part] for column in (*logps, *lengths))
        found = alpha_dpo(PairLogps(*columns, 7.0, **all_reduce), **options)[0]
        return found.item() * len(logps[0][part])

    together = TwoRanks()
    parts = together.run(lambda part: loss(part, {"all_reduce": together}), [slice(1), slice(1, None)])
    assert sum(parts) / 4 == pytest.approx(loss(slice(None), {}) / 4, rel=1e-12)
    assert sum(loss(part, {}) for part in (slice(1), slice(1, None))) / 4 != pytest.approx(sum(parts) / 4, rel=1e-3)


def test_values_that_are_not_finite_are_left_out():
    statistics = RunningStatistics()
    statistics.update(torch.tensor([1.0, 3.0]))
    before = statistics.state_dict()
    statistics.update(torch.tensor([1.0, float("nan")]))
    assert statistics.state_dict() == before
