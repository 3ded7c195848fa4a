"""Callbacks of preference training: learning dynamics, probe pairs, health of sampled text, and the alarm."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spo_ray.core.dynamics import forecast
from spo_ray.core.gradients import Gradients
from spo_ray.core.losses import Metrics
from spo_ray.train.alarm import Alarm
from spo_ray.train.data_loader import RowTable
from spo_ray.train.generation import other_greedy_answers, text_health
from spo_ray.train.logp_eval import Measure
from spo_ray.train.loop import Callback
from spo_ray.train.spec import TrainJob

SIDES = ("chosen", "rejected")
HEALTH_PROMPTS, HEALTH_TOKENS = 8, 64
"""Prompts with a sampled answer, and the longest answer in tokens: enough to see repetition, at little cost."""


PROBES, LONGEST = 20, 200
"""Measurements of the probe pairs in a training, and most steps between two, where no interval is set."""


def probe_interval(every: int | None, total: float) -> int:
    """Return the number of steps between measurements of the probe pairs in a training of ``total`` steps."""
    return every or max(1, min(LONGEST, int(total) // PROBES))


class DynamicsCallback(Callback):
    """Compare Theorem 1's first-order forecast of an optimizer step with the realised change, every ``every`` steps.

    At these steps it keeps a copy of the parameters, and the gradients g of both mean logps. For plain SGD the forecast
    would be ``-alpha * <g, grad F>``; for the optimizer's own update it is ``<g, update>``.
    """

    def __init__(self, params: Sequence[Tensor], every: int | None, measure: Measure, table: RowTable) -> None:
        self.params, self.every, self.measure, self.table = params, every, measure, table
        self.side_gradients: dict[str, Gradients] = {}
        self.before: list[Tensor] = []

    def on_step_begin(self, step: int) -> dict[str, Gradients] | None:
        """Copy the parameters; return a dictionary for ``spo_gradients`` to fill, or None at a step not measured."""
        if not self.every or (step - 1) % self.every:
            return None
        self.before = [p.detach().clone() for p in self.params]
        return self.side_gradients

    def on_step_end(self, record: Metrics, indices: Sequence[int]) -> Metrics:
        """Return ``dynamics/*`` from the batch's mean logps before and after the step."""
        if not self.before:
            return {}
        after = self.measure.pair_means(self.table, indices)
        update = [p.detach() - start for p, start in zip(self.params, self.before, strict=True)]
        metrics = {}
        for side in SIDES:
            metrics[f"dynamics/forecast_{side}"] = forecast(self.side_gradients[side], update)
            metrics[f"dynamics/realised_{side}"] = after[f"logps/{side}"] - record[f"logps/{side}"]
        self.side_gradients, self.before = {}, []
        return metrics


class ProbePairsCallback(Callback):
    """Measure logps of the probe pairs and of the greedy answers y*, and of the held-out pairs at score gates."""

    def __init__(self, job: TrainJob, measure: Measure, table: RowTable, held_out: RowTable | None) -> None:
        self.measure, self.table, self.held_out, self.score_at = measure, table, held_out, job.score_at
        settings = job.config.preference
        self.every, self.pairs = settings.probe_every, range(min(len(table), settings.probe_pairs))
        self.tops = other_greedy_answers(measure, table.rows(self.pairs), settings.probe_top_tokens)

    def on_step_end(self, record: Metrics, indices: Sequence[int]) -> Metrics:
        """Return ``probe/*`` and ``held_out/*``."""
        step, metrics = record["step"], {}
        if (
            step % probe_interval(self.every, record["total_steps"]) == 0
            or step == record["total_steps"]
            or step in self.score_at
        ):
            means = self.measure.pair_means(self.table, self.pairs)
            metrics = {f"probe/{key}": value for key, value in means.items()}
            if self.tops:
                metrics["probe/logps/top"] = self.measure.mean_logp(self.tops)
        if step in self.score_at and self.held_out is not None:
            means = self.measure.pair_means(self.held_out, range(len(self.held_out)))
            metrics |= {f"held_out/{key}": value for key, value in means.items()}
        return metrics


class TextHealthCallback(Callback):
    """Measure sampled answers to the first prompts with :func:`text_health`."""

    def __init__(self, job: TrainJob, measure: Measure, table: RowTable) -> None:
        self.measure, self.settings, self.seed = measure, job.config.preference, job.config.seed
        self.rows = table.rows(range(min(len(table), HEALTH_PROMPTS)))

    def on_step_end(self, record: Metrics, indices: Sequence[int]) -> Metrics:
        """Return ``health/*``."""
        every, step = self.settings.health_every, record["step"]
        if not every or (step % every and step != record["total_steps"]):
            return {}
        return text_health(self.measure, self.rows, HEALTH_TOKENS, self.seed)


class AlarmCallback(Callback):
    """Check the metrics of the callbacks before it against the alarm's limits."""

    def __init__(self, alarm: Alarm) -> None:
        self.alarm = alarm

    def on_step_end(self, record: Metrics, indices: Sequence[int]) -> Metrics:
        """Return ``alarm/*``."""
        return self.alarm.check(record)

    def state_dict(self) -> dict[str, Any]:
        """Return the alarm's state."""
        return self.alarm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the alarm's state."""
        self.alarm.load_state_dict(state)
