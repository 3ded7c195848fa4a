"""Running statistics of a scalar over training steps, for losses that need them."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

DECAY = 0.9
EPSILON = 1e-4
"""Smallest spread (nats per token) that counts as one: policy and reference closer than that are the same."""
AllReduce = Callable[[Sequence[Tensor]], None]
"""Sums tensors in place over data-parallel ranks."""


def single_rank(tensors: Sequence[Tensor]) -> None:
    """The sum over one rank."""


class RunningStatistics:
    """Exponential moving average of mean and spread, corrected for its start at zero.

    The first and second moments are averaged, not the spread of single batches: a batch of one pair has none.
    """

    def __init__(self, decay: float = DECAY) -> None:
        self.decay = decay
        self.first = self.second = self.weight = 0.0
        self.training = True

    def update(self, values: Tensor, all_reduce: AllReduce = single_rank) -> None:
        """Take in the values of one optimizer step, of all ranks; nothing while frozen, or if one is not finite."""
        if not self.training:
            return
        count, first, second = _sums(values, all_reduce)
        if not math.isfinite(second):
            return
        self.first = self.decay * self.first + (1 - self.decay) * first / count
        self.second = self.decay * self.second + (1 - self.decay) * second / count
        self.weight = self.decay * self.weight + (1 - self.decay)

    def zscore(self, values: Tensor) -> Tensor:
        """Values in spreads from the mean; 0 as long as nothing was taken in."""
        if not self.weight:
            return torch.zeros_like(values)
        mean = self.first / self.weight
        variance = max(0.0, self.second / self.weight - mean**2)
        return (values - mean) / max(variance**0.5, EPSILON)

    @contextmanager
    def frozen(self) -> Generator[None]:
        """For evaluation: updates do nothing."""
        before, self.training = self.training, False
        try:
            yield
        finally:
            self.training = before

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"first": self.first, "second": self.second, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.first, self.second, self.weight = state["first"], state["second"], state["weight"]


class ReferenceStatistics(RunningStatistics):
    """What AlphaDPO's public trainer does, for comparisons: flaws included.

    The averages of batch mean and batch spread start at zero without correction, so the first z-scores are about ten
    times too large; they move in evaluation too; a batch of one pair has spread NaN, and equal values give 0 / 0.
    """

    def update(self, values: Tensor, all_reduce: AllReduce = single_rank) -> None:
        """Take in one batch, frozen or not."""
        count, first, second = _sums(values, all_reduce)
        mean = first / count
        variance = max(0.0, second - count * mean**2) / (count - 1) if count > 1 else float("nan")
        self.first = self.decay * self.first + (1 - self.decay) * mean
        self.second = self.decay * self.second + (1 - self.decay) * variance**0.5
        self.weight = 1.0

    def zscore(self, values: Tensor) -> Tensor:
        """Values in averaged batch spreads from the averaged mean."""
        return (values - self.first) / self.second


def _sums(values: Tensor, all_reduce: AllReduce) -> tuple[float, float, float]:
    """Count, sum and sum of squares over all ranks."""
    v = values.detach().double()
    sums = torch.stack([torch.ones_like(v).sum(), v.sum(), (v * v).sum()])
    all_reduce([sums])
    count, first, second = sums.tolist()
    return count, first, second
