"""How the objective depends on each parameter: points with intervals over seeds, importances."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

from spo_ray.core.stats import mean_std
from spo_ray.sweep.results import Row, one_each
from spo_ray.sweep.space import distributions, point_key
from spo_ray.sweep_config import LogUniform, SweepConfig, names_of

FEWEST_TRIALS = 4
"""For importances."""


class Estimate(NamedTuple):
    """The objective at one point of the search space."""

    values: dict[str, Any]
    mean: float
    low: float
    high: float
    """95% interval: Student's t over seeds; with one seed that of the score itself, over questions or pairs."""
    seeds: int
    finished: bool
    """Whether all its trials reached the end; else their last scores count."""


def estimates(rows: Sequence[Row], objective: str) -> list[Estimate]:
    """One for each point that was scored, in the order of the trials; of equal trials one counts."""
    points: dict[str, list[Row]] = {}
    for row in one_each(row for row in rows if objective in row["scores"]):
        points.setdefault(point_key(row["values"]), []).append(row)
    return [_estimate(group, objective) for group in points.values()]


def _estimate(group: list[Row], objective: str) -> Estimate:
    scores = [row["scores"][objective] for row in group]
    mean, std = mean_std([score["value"] for score in scores])
    half = stats.t.ppf(0.975, len(scores) - 1) * std / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    low, high = mean - half, mean + half
    if len(scores) == 1:
        low, high = scores[0].get("low", mean), scores[0].get("high", mean)
    finished = all(row["status"] == "finished" for row in group)
    return Estimate(group[0]["values"], mean, low, high, len(scores), finished)


def importances(rows: Sequence[Row], sweep: SweepConfig) -> dict[str, float]:
    """Share of the first objective's variance that each parameter explains, by fANOVA (Hutter et al., ICML 2014).

    Over the last scores of all scored trials; empty with fewer than ``FEWEST_TRIALS``, or where nothing differs.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    objective = names_of(sweep)[0]
    scored = [row for row in rows if objective in row["scores"]]
    if len(scored) < FEWEST_TRIALS or len({row["scores"][objective]["value"] for row in scored}) == 1:
        return {}
    study = optuna.create_study(direction="maximize")
    space = distributions(sweep)
    for row in scored:
        value = row["scores"][objective]["value"]
        study.add_trial(optuna.trial.create_trial(params=row["values"], distributions=space, value=value))
    found = optuna.importance.get_param_importances(
        study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
    )
    return {key: float(found.get(key, 0.0)) for key in sweep.space}


def is_log(key: str, sweep: SweepConfig) -> bool:
    """Whether a parameter belongs on a logarithmic axis."""
    dimension = sweep.space[key]
    return isinstance(dimension, LogUniform) or (
        len(dimension.values) > 2 and all(_positive(value) for value in dimension.values)
    )


def is_number(key: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all values of a parameter are numbers."""
    values = [row["values"].get(key) for row in rows]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
