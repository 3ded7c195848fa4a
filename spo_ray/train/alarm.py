"""The displacement alarm: preferred answers that lose probability, and text that degenerates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from spo_ray.config.train import AlarmConfig
from spo_ray.core.losses import Metrics

PREFIX = "alarm/"
STOP = "alarm/stop"


def _ratio(value: float, start: float) -> float:
    """Return how many times one length is as long or as short as another; lengths below 1 count as 1."""
    ratio = max(value, 1.0) / max(start, 1.0)
    return max(ratio, 1.0 / ratio)


@dataclass(frozen=True)
class Rule:
    """A metric, its limit, and what to say when it exceeds the limit."""

    setting: str
    """Field of :class:`AlarmConfig` with the limit."""
    metric: str
    """Key of the step log."""
    text: str
    """Message with the placeholders ``value`` and ``limit``."""
    advice: str
    """Settings to change."""
    compared: Callable[[float, float], float] = lambda value, start: value
    """Function of the metric now and at its first measurement; its result is compared with the limit."""


RULES = {
    "chosen": Rule(
        "max_fall",
        "probe/delta_logp_chosen_per_token",
        "preferred answers lost {value:.2f} nats per token (limit {limit:g})",
        "lower the learning rate; an SFT term helps too (spo)",
        lambda value, start: -value,
    ),
    "both_fell": Rule(
        "max_both_fell",
        "probe/both_fell",
        "both log-probabilities fell in {value:.0%} of pairs (limit {limit:.0%})",
        "drop similar pairs; an SFT term helps too (spo)",
    ),
    "repetition": Rule(
        "max_repetition",
        "health/repetition",
        "{value:.0%} of 4-grams in samples are repeats (limit {limit:.0%})",
        "lower the learning rate, or train for fewer epochs",
    ),
    "length": Rule(
        "max_length_ratio",
        "health/length",
        "samples became {value:.1f} times longer or shorter (limit {limit:g})",
        "lower the learning rate; compare both sides' lengths",
        _ratio,
    ),
}


class Alarm:
    """Compares the logged metrics with the limits; sounds once each time a limit is exceeded anew."""

    def __init__(self, config: AlarmConfig) -> None:
        self.config = config
        self.start: Metrics = {}
        """First measurement of each metric."""
        self.exceeded: set[str] = set()
        """Rules whose limit was exceeded at their last measurement."""
        self.sounded: list[dict[str, Any]] = []
        """All alarms so far: step, rule and value."""

    def check(self, record: Mapping[str, float]) -> Metrics:
        """Return ``alarm/RULE`` with the value for each limit exceeded anew, and ``alarm/stop`` if training ends."""
        found: Metrics = {}
        for name, rule in RULES.items():
            limit = getattr(self.config, rule.setting)
            if limit is None or rule.metric not in record:
                continue
            now = record[rule.metric]
            value = rule.compared(now, self.start.setdefault(rule.metric, now))
            if value <= limit:
                self.exceeded.discard(name)
            elif name not in self.exceeded:
                self.exceeded.add(name)
                found[f"{PREFIX}{name}"] = value
                self.sounded.append({"step": int(record["step"]), "alarm": name, "value": value})
        if found and self.config.on_alarm == "stop":
            found[STOP] = 1.0
        return found

    def result(self) -> dict[str, Any]:
        """Return the alarms for the training's result; empty without any."""
        if not self.sounded:
            return {}
        stopped = {"stopped_at": self.sounded[-1]["step"]} if self.config.on_alarm == "stop" else {}
        return {"alarms": self.sounded} | stopped

    def state_dict(self) -> dict[str, Any]:
        """Return copies for a checkpoint, which is written while training continues."""
        return {"start": dict(self.start), "exceeded": sorted(self.exceeded), "sounded": list(self.sounded)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.start, self.exceeded, self.sounded = dict(state["start"]), set(state["exceeded"]), list(state["sounded"])


class Told(NamedTuple):
    """An alarm in words."""

    text: str
    advice: str


def describe(record: Mapping[str, Any], config: AlarmConfig) -> list[Told]:
    """Return a step's alarms in words: value and limit, and what to do."""
    values = {name: record.get(f"{PREFIX}{name}") for name in RULES}
    return [
        Told(RULES[name].text.format(value=value, limit=getattr(config, RULES[name].setting)), RULES[name].advice)
        for name, value in values.items()
        if value is not None
    ]
