"""The search space: lists of trials, their configurations, and Optuna's distributions."""

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

OWN = ("methods.", "preference.", "model.lora_rank", "model.lora_alpha", "model.lora_targets")
"""Beginnings of keys that only a trial's preference training depends on."""


class Point(TypedDict):
    """One trial, as Ray Tune passes it to the trial's process."""

    number: int | None
    """Position in the list of trials, from 0; None if a searcher suggests the points one by one."""
    values: dict[str, Value]
    """Values by dotted keys of the configuration."""
    seed: int


def sweep_of(config: Config) -> SweepConfig:
    """Return the section ``sweep``.

    Raises:
        UserError: the configuration has none.
    """
    if config.sweep is None:
        raise UserError("the configuration has no section sweep: see configs/sweeps/toy.yaml")
    return config.sweep


def short_text(value: object, digits: int = 4) -> str:
    """Return a value as text; a float with ``digits`` significant digits."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return display names by key: the last part of the key, or the whole key if two keys end in the same part."""
    given = list(keys)
    ends = [".".join(key.split(".")[-2 if key.startswith("preference.") else -1 :]) for key in given]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(given, ends, strict=True)}


def point_key(values: Mapping[str, Value], *more: Value) -> str:
    """Return a text that is the same for equal points."""
    return json.dumps([dict(values), *more], sort_keys=True)


def listed_points(config: Config) -> list[Point]:
    """Return all trials of a random or grid search; they depend on ``seed`` only.

    Equal draws become one point. The trials of one point, one for each seed, follow each other.

    Raises:
        UserError: a combination of values is not a valid configuration.
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
    trials = itertools.product(points.values(), dict.fromkeys(sweep.seeds))
    return [{"number": i, "values": values, "seed": seed} for i, (values, seed) in enumerate(trials)]


def trial_count(config: Config) -> int:
    """Return the number of trials of a sweep."""
    sweep = sweep_of(config)
    return sweep.samples if sweep.searcher == "optuna" else len(listed_points(config))


def draw(dimension: LogUniform | Choice, rng: random.Random) -> Value:
    """Draw one value of a dimension."""
    if isinstance(dimension, LogUniform):
        return math.exp(rng.uniform(math.log(dimension.low), math.log(dimension.high)))
    return rng.choice(dimension.values)


def trial_config(config: Config, values: Mapping[str, Value], seed: int) -> Config:
    """Return the configuration of one trial; it can also be run by itself.

    Raises:
        UserError: the values are not a valid configuration together.
    """
    try:
        return with_values(config.model_copy(update={"sweep": None}), {**values, "seed": seed})
    except ValidationError as error:
        raise UserError(
            f"sweep.space contains {dict(values)}, which is no valid configuration: {error.errors()[0]['msg']}"
        ) from error


def distributions(sweep: SweepConfig) -> dict[str, Any]:
    """Return the search space as Optuna's distributions."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        key: FloatDistribution(d.low, d.high, log=True)
        if isinstance(d, LogUniform)
        else CategoricalDistribution(d.values)
        for key, d in sweep.space.items()
    }


def shared_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the start of a trial (SFT, pairs, reference log-probabilities) depends on."""
    return {key: value for key, value in values.items() if not key.startswith(OWN)}


def start_key(values: Mapping[str, Any]) -> str:
    """Return a text that is the same for trials with the same start."""
    return json.dumps(shared_values(values), sort_keys=True)


def run_for(run: Run, values: Mapping[str, Any]) -> Run:
    """Return the run that makes the start of a trial: the sweep's own, or one in its folder ``shared``."""
    differing = shared_values(values)
    if not differing:
        return run
    tag = hashlib.sha256(start_key(values).encode()).hexdigest()[:8]
    return run.at(run.root / "shared" / tag, with_values(run.config, differing))
