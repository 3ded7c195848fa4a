"""What is watched while a preference method trains: fixed probe pairs, and the learning dynamics of single steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from spo_ray.core.dynamics import forecast
from spo_ray.core.gradients import Gradients
from spo_ray.core.losses import Metrics

SIDES = ("chosen", "rejected")


class StepWatch:
    """Theorem 1 on real steps: what the optimizer's update should change to first order, and what it did.

    Every ``every`` steps it keeps a copy of the parameters and the gradients of both mean log-probabilities, for which
    plain SGD's forecast would be ``-alpha * <g, grad F>``; the optimizer's own is ``<g, update>``.
    """

    def __init__(self, params: Sequence[Tensor], every: int | None) -> None:
        self.params, self.every = params, every
        self.gradients: dict[str, Gradients] = {}
        self.before: list[Tensor] = []

    def start(self, step: int) -> dict[str, Any]:
        """Before a step: arguments for ``spo_gradients`` where this step is watched."""
        self.gradients, self.before = {}, []
        if not self.every or (step - 1) % self.every:
            return {}
        self.before = [p.detach().clone() for p in self.params]
        return {"side_gradients": self.gradients}

    def finish(self, before: Mapping[str, float], after: Mapping[str, float]) -> Metrics:
        """After a step, from the batch's mean log-probabilities before and after it; empty where not watched."""
        update = [p.detach() - start for p, start in zip(self.params, self.before, strict=True)]
        metrics = {}
        for side in SIDES:
            metrics[f"dynamics/forecast_{side}"] = forecast(self.gradients[side], update)
            metrics[f"dynamics/realised_{side}"] = after[f"logps/{side}"] - before[f"logps/{side}"]
        self.gradients, self.before = {}, []
        return metrics
