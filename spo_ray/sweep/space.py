"""From a search space to trials, and to Optuna's distributions."""

import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from pydantic import ValidationError

from spo_ray.config.keys import with_values
from spo_ray.config.schema import Config
from spo_ray.config.sweep import Choice, Grid, LogUniform, SweepConfig, Value
from spo_ray.errors import UserError
from spo_ray.runtime.run import Run


class Point(TypedDict):
    """What Ray Tune hands to a trial."""

    number: int | None
    """From 0 in the order of the list; None where a searcher suggests points one by one."""
    values: dict[str, Value]
    """By dotted keys."""
    seed: int


def sweep_of(config: Config) -> SweepConfig:
    """The sweep section.

    Raises:
        UserError: there is none.
    """
    if config.sweep is None:
        raise UserError("the configuration has no section sweep: see configs/sweeps/toy.yaml")
    return config.sweep


def short_text(value: object, digits: int = 4) -> str:
    """A value in a line, a table or a figure."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Parameters' names in a line or a figure: the ends of their keys, whole keys where these are the same."""
    given = list(keys)
    ends = [".".join(key.split(".")[-2 if key.startswith("preference.") else -1 :]) for key in given]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(given, ends, strict=True)}


def point_key(values: Mapping[str, Value], *more: Value) -> str:
    """What equal points have in common: a text."""
    return json.dumps([dict(values), *more], sort_keys=True)


def listed_points(config: Config) -> list[Point]:
    """All trials of a random or grid search, the same for the same seed; those of one point come one after another.

    Equal draws are tried once.

    Raises:
        UserError: a combination of values is none that a run could have.
    """
    sweep = sweep_of(config)
    rng = random.Random(f"sweep-{config.seed}")
    grids = {key: d.values for key, d in sweep.space.items() if isinstance(d, Grid)}
    drawn = {key: d for key, d in sweep.space.items() if not isinstance(d, Grid)}
    points: dict[str, dict[str, Value]] = {}
    for _ in range(sweep.samples if sweep.searcher == "random" else 1):
        sample = {key: draw(dimension, rng) for key, dimension in drawn.items()}
        for combination in itertools.product(*grids.values()):
            values = sample | dict(zip(grids, combination, strict=True))
            points.setdefault(point_key(values), {key: values[key] for key in sweep.space})
    for values in points.values():
        trial_config(config, values, sweep.seeds[0])
    trials = [(values, seed) for values in points.values() for seed in dict.fromkeys(sweep.seeds)]
    return [{"number": i, "values": values, "seed": seed} for i, (values, seed) in enumerate(trials)]


def trial_count(config: Config) -> int:
    """How many trials a sweep has."""
    sweep = sweep_of(config)
    return sweep.samples if sweep.searcher == "optuna" else len(listed_points(config))


def draw(dimension: LogUniform | Choice | Grid, rng: random.Random) -> Value:
    """One value."""
    if isinstance(dimension, LogUniform):
        return math.exp(rng.uniform(math.log(dimension.low), math.log(dimension.high)))
    return rng.choice(dimension.values)


def trial_config(config: Config, values: Mapping[str, Value], seed: int) -> Config:
    """A trial's own configuration: complete, ready to be run by itself.

    Raises:
        UserError: the values don't go together.
    """
    try:
        return with_values(config.model_copy(update={"sweep": None}), {**values, "seed": seed})
    except ValidationError as error:
        raise UserError(f"sweep.space allows {dict(values)}: {error.errors()[0]['msg']}") from error


def distributions(sweep: SweepConfig) -> dict[str, Any]:
    """The space for Optuna."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        key: FloatDistribution(d.low, d.high, log=True)
        if isinstance(d, LogUniform)
        else CategoricalDistribution(d.values)
        for key, d in sweep.space.items()
    }


OWN = ("methods.", "preference.", "model.lora_rank", "model.lora_alpha", "model.lora_targets")
"""Keys that matter to a trial's own training alone."""


def shared_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a trial's values, those that its start depends on."""
    return {key: value for key, value in values.items() if not key.startswith(OWN)}


def run_for(run: Run, values: Mapping[str, Any]) -> Run:
    """Return the run whose stages a trial starts from: the sweep's own, or one in its folder ``shared``."""
    differing = shared_values(values)
    if not differing:
        return run
    tag = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]
    return run.at(run.root / "shared" / tag, with_values(run.config, differing))
