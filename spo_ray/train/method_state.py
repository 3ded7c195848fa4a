"""Preference methods: arguments of ``spo_gradients`` from a method's configuration, and state between steps."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from spo_ray.config.methods import AlphaDpo, Base, DpoNll, MethodConfig, Nll, Spo, Trained, base_loss
from spo_ray.core.losses import LOSSES, Loss
from spo_ray.core.running_statistics import RunningStatistics
from spo_ray.core.safe_region import DualVariable
from spo_ray.train.loop import Callback

GAPS = {"reference": lambda metrics: -metrics["logps/chosen_change"], "inner": lambda m: m.get("spo/inner_gap", 0.0)}


class Method(Callback):
    """Preference method in training: the arguments of ``spo_gradients``, and state that changes between steps."""

    def __init__(self, config: MethodConfig) -> None:
        self.lr = config.lr
        base = base_loss(config)
        self.statistics = RunningStatistics() if isinstance(base, AlphaDpo) else None
        self.arguments: dict[str, Any] = {"base": _loss(base, self.statistics), "beta": getattr(base, "beta", 1.0)}
        self.arguments |= _spo(config) if isinstance(config, Spo) else PLAIN
        self.every = config.inner.every if isinstance(config, Spo) else 1
        region = config.safe_region if isinstance(config, Spo) else None
        self.gap = GAPS[region.gap] if region else None
        start = self.arguments["lambda_sft"]
        self.dual = DualVariable(start, region.epsilon, region.lr, highest=region.max_lambda) if region else None

    def at(self, step: int) -> dict[str, Any]:
        """Return the arguments of ``spo_gradients`` for a step from 1 on; one step in ``every`` has term (b)."""
        return self.arguments if (step - 1) % self.every == 0 else self.arguments | {"inner_steps": 0}

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


FAR, NOTHING, HEAVY = 0.1, 1e-4, 1.0
"""Shares of L_SFT that the inner step may change unnoticed, and the size of term (b) against term (a)."""


def lower_level_notices(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what a step's log says of the lower level that its user should know, by the kind of notice."""
    share, size = record.get("spo/inner_gap_share"), record.get("spo/term_b_over_a")
    if share is None or size is None:
        return {}
    page = "see docs/mathematics.md"
    found = {
        "far": (share > FAR, f"the inner step lowers L_SFT by {share:.0%}, which is far for a step: lower inner.eta"),
        "nothing": (
            share < NOTHING,
            f"the inner step lowers L_SFT by only {share:.1g} of it: term (b) has hardly an effect; raise inner.eta, "
            "or save its cost with inner.steps: 0",
        ),
        "heavy": (size > HEAVY, f"term (b) is {size:.1f} times term (a): lower inner.eta, inner.every or lambda_sft"),
    }
    return {kind: f"{text}; {page}" for kind, (applies, text) in found.items() if applies}


PLAIN = {"lambda_sft": 0.0, "gamma": 0.0, "inner_steps": 0, "eta": 0.0}
"""Arguments with which ``spo_gradients`` computes the base loss alone, without lower level and hinge."""
SAME = {"lambda_sft", "gamma", "sft_reduction", "norm_scope", "norm_of", "hinge"}
"""Fields of :class:`Spo` that are arguments of ``spo_gradients`` under the same name."""


def _loss(base: Base | Nll | DpoNll, statistics: RunningStatistics | None) -> Loss:
    """Return the base loss with its configuration's own fields as parameters."""
    parameters = base.model_dump(exclude={"type", *Trained.model_fields})
    return partial(LOSSES[base.type], **parameters | ({"statistics": statistics} if statistics else {}))


def _spo(config: Spo) -> dict[str, Any]:
    inner = config.inner
    lower = {"inner_steps": inner.steps, "eta": inner.eta, "inner_method": inner.method, "term_b_weight": inner.every}
    return config.model_dump(include=SAME) | lower
