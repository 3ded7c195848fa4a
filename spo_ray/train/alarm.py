"""The displacement alarm: preferred answers that lose probability, and text that falls apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spo_ray.config.train import AlarmConfig
from spo_ray.core.losses import Metrics

PREFIX = "alarm/"
STOP = "alarm/stop"


@dataclass(frozen=True)
class Rule:
    """What sets the alarm off."""

    setting: str
    """The field of :class:`AlarmConfig` with the limit."""
    metric: str
    against_start: bool
    """The metric's ratio to its first value, or the metric as it is."""
    text: str
    advice: str


SLOWER = "lower preference.theta.lr and preference.phi.lr, or train for fewer epochs"
ANCHOR = "use a method with an SFT term (spo, dpo_nll), or raise its lambda_sft or mu"
RULES = {
    "chosen": Rule(
        "max_fall",
        "probe/delta_logp_chosen",
        False,
        "the mean log pi(y_w) of the probe pairs is {value:.2f} nats below its start (limit {limit:g})",
        f"{ANCHOR}; or {SLOWER}",
    ),
    "both_fell": Rule(
        "max_both_fell",
        "probe/both_fell",
        False,
        "in {value:.0%} of the probe pairs both log-probabilities fell (limit {limit:.0%})",
        f"{ANCHOR}; look for pairs with nearly equal sides (pairs.dedup, pairs.select)",
    ),
    "repetition": Rule(
        "max_repetition",
        "health/repetition",
        False,
        "{value:.0%} of the 4-grams in sampled answers were there before (limit {limit:.0%})",
        f"{SLOWER}; the rejected answers may differ from the chosen ones in form",
    ),
    "length": Rule(
        "max_length_ratio",
        "health/length",
        True,
        "sampled answers are {value:.1f} times as long, or as short, as at the start (limit {limit:g})",
        f"{SLOWER}; compare lengths of both sides (spo-ray inspect, pairs.max_length_ratio)",
    ),
}


class Alarm:
    """Looks at the records of a method's steps. It sounds once for every time that a limit is passed."""

    def __init__(self, config: AlarmConfig) -> None:
        self.config = config
        self.start: Metrics = {}
        self.sounding: dict[str, float] = {}
        """What is beyond its limit now, with its value."""
        self.sounded: list[dict[str, Any]] = []

    def check(self, record: Mapping[str, float]) -> Metrics:
        """``alarm/NAME`` with the value for everything that passed its limit at this step."""
        found: Metrics = {}
        for name, rule in RULES.items():
            limit = getattr(self.config, rule.setting)
            if limit is None or rule.metric not in record:
                continue
            value = self._value(rule, record[rule.metric])
            if value <= limit:
                self.sounding.pop(name, None)
                continue
            if name not in self.sounding:
                found[f"{PREFIX}{name}"] = value
                self.sounded.append({"step": int(record["step"]), "alarm": name, "value": value})
            self.sounding[name] = value
        if found and self.config.on_alarm == "stop":
            found[STOP] = 1.0
        return found

    def _value(self, rule: Rule, value: float) -> float:
        if rule.setting == "max_fall":
            return -value
        if not rule.against_start:
            return value
        ratio = max(value, 1.0) / max(self.start.setdefault(rule.metric, value), 1.0)
        return max(ratio, 1.0 / ratio)

    def result(self) -> dict[str, Any]:
        """What the training's result says of it."""
        if not self.sounded:
            return {}
        stopped = {"stopped_at": self.sounded[-1]["step"]} if self.config.on_alarm == "stop" else {}
        return {"alarms": self.sounded} | stopped

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: copies, for it is written while training goes on."""
        return {"start": dict(self.start), "sounding": dict(self.sounding), "sounded": list(self.sounded)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.start, self.sounding, self.sounded = dict(state["start"]), dict(state["sounding"]), list(state["sounded"])


def describe(record: Mapping[str, Any], config: AlarmConfig) -> list[str]:
    """What a step's alarms say: the step, the numbers, what was done, what to try."""
    texts = []
    for name, rule in RULES.items():
        value = record.get(f"{PREFIX}{name}")
        if value is not None:
            told = rule.text.format(value=value, limit=getattr(config, rule.setting))
            texts.append(f"ALARM at step {record['step']}: {told}. Try: {rule.advice}")
    if texts and record.get(STOP):
        texts.append(f"training ends at step {record['step']} (on_alarm: stop)")
    return texts
