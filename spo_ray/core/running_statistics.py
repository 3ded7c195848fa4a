"""Running statistics of a scalar over training steps, for losses that need them."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DECAY = 0.9
EPSILON = 1e-4
"""Smallest standard deviation (nats per token) to divide by: below it, policy and reference count as equal."""
AllReduce = Callable[[Sequence[Tensor]], None]
"""Function that sums tensors in place over data-parallel ranks."""


def single_rank(tensors: Sequence[Tensor]) -> None:
    """Do nothing: the all-reduce of a single rank."""


class RunningStatistics:
    """Exponential moving average of mean and standard deviation, with bias correction for the start at zero.

    The first and second moments are averaged, not the standard deviations of batches, so batches of one pair work.
    """

    def __init__(self, decay: float = DECAY) -> None:
        self.decay = decay
        self.first = self.second = self.weight = 0.0

    def update(self, values: Tensor, all_reduce: AllReduce = single_rank) -> None:
        """Add the values of one optimizer step, of all ranks; do nothing if one of them is not finite."""
        v = values.detach().double()
        sums = torch.stack([torch.ones_like(v).sum(), v.sum(), (v * v).sum()])
        all_reduce([sums])
        count, first, second = sums.tolist()
        if not math.isfinite(second):
            return
        self.first = self.decay * self.first + (1 - self.decay) * first / count
        self.second = self.decay * self.second + (1 - self.decay) * second / count
        self.weight = self.decay * self.weight + (1 - self.decay)

    def zscore(self, values: Tensor) -> Tensor:
        """Return the values' distance from the mean in standard deviations; 0 before the first update."""
        if not self.weight:
            return torch.zeros_like(values)
        mean = self.first / self.weight
        variance = max(0.0, self.second / self.weight - mean**2)
        return (values - mean) / max(variance**0.5, EPSILON)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"first": self.first, "second": self.second, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of a checkpoint."""
        self.first, self.second, self.weight = state["first"], state["second"], state["weight"]
