"""Preference methods: arguments of ``spo_gradients`` from a method's configuration, and state between steps."""

from functools import partial
from typing import Any

from spo_ray.config.methods import AlphaDpo, Base, DpoNll, MethodConfig, Nll, Spo, Trained
from spo_ray.core.losses import LOSSES, Loss
from spo_ray.core.running_statistics import RunningStatistics
from spo_ray.core.safe_region import DualVariable
from spo_ray.train.loop import Callback

GAPS = {"reference": lambda metrics: -metrics["logps/chosen_change"], "inner": lambda m: m.get("spo/inner_gap", 0.0)}


class Method(Callback):
    """Preference method in training: the arguments of ``spo_gradients``, and state that changes between steps."""

    def __init__(self, config: MethodConfig) -> None:
        self.lr = config.lr
        base = config.base if isinstance(config, Spo) else config
        self.statistics = RunningStatistics() if isinstance(base, AlphaDpo) else None
        self.arguments: dict[str, Any] = {"base": _loss(base, self.statistics), "beta": getattr(base, "beta", 1.0)}
        self.arguments |= _spo(config) if isinstance(config, Spo) else PLAIN
        region = config.safe_region if isinstance(config, Spo) else None
        self.gap = GAPS[region.gap] if region else None
        start = self.arguments["lambda_sft"]
        self.dual = DualVariable(start, region.epsilon, region.lr, highest=region.max_lambda) if region else None

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        """Update lambda from the global metrics of a step; return ``spo/lambda`` and ``spo/gap``."""
        if self.dual is None or self.gap is None:
            return {}
        gap = self.gap(metrics)
        used, self.arguments["lambda_sft"] = self.arguments["lambda_sft"], self.dual.update(gap)
        return {"spo/lambda": used, "spo/gap": gap}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the running statistics and lambda."""
        parts = {"statistics": self.statistics, "dual": self.dual}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Restore what :meth:`state_dict` of the same method returned."""
        if self.statistics is not None:
            self.statistics.load_state_dict(state["statistics"])
        if self.dual is not None:
            self.dual.load_state_dict(state["dual"])
            self.arguments["lambda_sft"] = self.dual.value


PLAIN = {"lambda_sft": 0.0, "gamma": 0.0, "inner_steps": 0, "eta": 0.0}
"""Arguments with which ``spo_gradients`` computes the base loss alone, without lower level and hinge."""
SAME = {"lambda_sft", "gamma", "sft_reduction", "norm_scope", "norm_of", "hinge", "difference"}
"""Fields of :class:`Spo` that are arguments of ``spo_gradients`` under the same name."""


def _loss(base: Base | Nll | DpoNll, statistics: RunningStatistics | None) -> Loss:
    """Return the base loss with its configuration's own fields as parameters."""
    parameters = base.model_dump(exclude={"type", *Trained.model_fields})
    return partial(LOSSES[base.type], **parameters | ({"statistics": statistics} if statistics else {}))


def _spo(config: Spo) -> dict[str, Any]:
    inner = config.inner
    lower = {"inner_steps": inner.steps, "eta": inner.eta, "inner_mode": inner.mode}
    return config.model_dump(include=SAME) | lower | {"full_precision_inner": inner.full_precision}
