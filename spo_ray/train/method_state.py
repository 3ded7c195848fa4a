"""From a method's configuration to the arguments of the one step that trains them all."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from spo_ray.config.base import ConfigModel
from spo_ray.config.methods import AlphaDpo, MethodConfig, Spo
from spo_ray.core.losses import LOSSES, Loss
from spo_ray.core.running_statistics import ReferenceStatistics, RunningStatistics
from spo_ray.core.safe_region import DualVariable
from spo_ray.train.loop import Callback

STATISTICS: dict[str, Callable[[], RunningStatistics]] = {
    "corrected": RunningStatistics,
    "reference_exact": ReferenceStatistics,
}
GAPS = {"reference": lambda metrics: -metrics["logps/chosen_change"], "inner": lambda m: m.get("spo/inner_gap", 0.0)}


class Method(Callback):
    """A preference method in training: the step's arguments, and what it remembers between steps."""

    def __init__(self, config: MethodConfig) -> None:
        self.lr = config.lr
        base = config.base if isinstance(config, Spo) else config
        self.statistics = STATISTICS[base.statistics]() if isinstance(base, AlphaDpo) else None
        self.arguments: dict[str, Any] = {"base": _loss(base, self.statistics), "beta": getattr(base, "beta", 1.0)}
        self.arguments |= _spo(config) if isinstance(config, Spo) else PLAIN
        region = config.safe_region if isinstance(config, Spo) else None
        self.gap = GAPS[region.gap] if region else None
        start = self.arguments["lambda_sft"]
        self.dual = DualVariable(start, region.epsilon, region.lr, highest=region.max_lambda) if region else None
        self.raised: float | None = None

    def raise_lambda(self, factor: float, most: float) -> float | None:
        """Raise SPO's lambda; gives the new one, or None where there is none to raise."""
        old = self.arguments["lambda_sft"]
        if not old:
            return None
        self.arguments["lambda_sft"] = self.raised = max(old, min(most, old * factor))
        if self.dual is not None:
            self.dual.value = self.raised
        return self.raised

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        """Take in the global metrics of a step; gives what changed."""
        if self.dual is None or self.gap is None:
            return {}
        gap = self.gap(metrics)
        used, self.arguments["lambda_sft"] = self.arguments["lambda_sft"], self.dual.update(gap)
        return {"spo/lambda": used, "spo/gap": gap}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps: running statistics, lambda."""
        parts = {"statistics": self.statistics, "dual": self.dual}
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return state | ({} if self.raised is None else {"raised": {"lambda_sft": self.raised}})

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Continue from a checkpoint of the same method."""
        if self.statistics is not None:
            self.statistics.load_state_dict(state["statistics"])
        if "raised" in state:
            self.arguments["lambda_sft"] = self.raised = state["raised"]["lambda_sft"]
        if self.dual is not None:
            self.dual.load_state_dict(state["dual"])
            self.arguments["lambda_sft"] = self.dual.value


PLAIN = {"lambda_sft": 0.0, "gamma": 0.0, "inner_steps": 0, "eta": 0.0}
"""The SPO step without its lower level and its hinge: the base loss alone."""
SAME = {"lambda_sft", "gamma", "sft_reduction", "norm_scope", "norm_of", "hinge", "difference"}
"""Fields that are arguments of the step."""


def _loss(base: ConfigModel, statistics: RunningStatistics | None) -> Loss:
    """The loss of that name, with the section's fields for its parameters."""
    fields = base.model_dump()
    loss = LOSSES[fields.pop("type")]
    known = inspect.signature(loss).parameters
    return partial(loss, **{key: value for key, value in (fields | {"statistics": statistics}).items() if key in known})


def _spo(config: Spo) -> dict[str, Any]:
    inner = config.inner
    lower = {"inner_steps": inner.steps, "eta": inner.eta, "inner_mode": inner.mode}
    return config.model_dump(include=SAME) | lower | {"full_precision_inner": inner.full_precision}
