"""Section for sweeps: the search space, the scheduler, and the scores of trials."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from spo_ray.config.base import ConfigModel, Seed
from spo_ray.config.keys import with_values

Value = bool | int | float | str | None
FROM_LOG = (
    *("delta_logp_chosen", "delta_logp_chosen_per_token", "delta_logp_rejected"),
    *("reward_accuracy", "held_out_reward_accuracy"),
)
"""Scores that every trial has from its step log; all others come from the suites in ``eval``."""


class LogUniform(ConfigModel):
    """Numbers drawn uniformly in their logarithm."""

    type: Literal["loguniform"]
    low: PositiveFloat
    """Smallest value."""
    high: PositiveFloat
    """Largest value."""

    @model_validator(mode="after")
    def _range(self) -> "LogUniform":
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        return self


class Choice(ConfigModel):
    """Values of which one is drawn for every sample."""

    type: Literal["choice"]
    values: list[Value] = Field(min_length=1)
    """Values to draw from."""


class Grid(ConfigModel):
    """Values that are all tried, in all combinations with the other grids."""

    type: Literal["grid"]
    values: list[Value] = Field(min_length=1)
    """Values to try."""


Dimension = Annotated[LogUniform | Choice | Grid, Field(discriminator="type")]


class ValidationConfig(ConfigModel):
    """Rows that trials are scored on: taken out of the training split, so that no trial trains on them."""

    questions: PositiveInt = 100
    """Questions to score on; preference data has none."""
    pairs: NonNegativeInt = 0
    """Pairs for ``held_out_reward_accuracy``; preference data needs some."""


class SweepConfig(ConfigModel):
    """Search over settings with trials of one method; all other sections are the same as in an ordinary run."""

    method: str
    """Name of the method, from ``methods``."""
    space: dict[str, Dimension] = Field(min_length=1)
    """Search space, by dotted keys of the configuration such as ``methods.spo.base.beta``."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """``random``: ``samples`` draws, each combined with every point of the grids. ``grid``: every point of the grids
    once. ``optuna``: ``samples`` suggestions of TPE, which learns from the finished trials' objectives."""
    scheduler: Literal["asha", "fifo"] = "asha"
    """``asha``: asynchronous successive halving on the first objective, at ``score_at[0]`` times the powers of
    ``reduction_factor``. ``fifo``: every trial trains to its end unless it collapses."""
    reduction_factor: Annotated[int, Field(ge=2)] = 2
    """ASHA lets the best of so many trials go on; the others are stopped."""
    samples: PositiveInt = 12
    """Draws or suggestions of the searcher; equal draws are tried once. A grid search ignores it."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    """Seeds of the order of batches and of the adapters; every point is tried with each. The data stays the same."""
    objectives: list[Annotated[str, Field(pattern=r"^-?[a-z]")]] = Field(default=["accuracy_greedy"], min_length=1)
    """Scores to maximise, or with a minus in front to minimise: ``accuracy_greedy``, ``delta_logp_chosen``,
    ``-health/greedy/repetition_4``, ``alpaca_eval/ANNOTATOR/win_rate``. The first decides which trials are stopped and
    which is the best; the others break ties."""
    score_at: list[Annotated[float, Field(gt=0.0, le=1.0)]] = Field(default=[0.25, 0.5, 1.0], min_length=1)
    """Shares of a trial's steps after which it is scored and waits for the scheduler; rising, and the last is 1."""
    max_fall: PositiveFloat | None = 0.15
    """Largest fall of the probe pairs' log pi(y_w), in nats per token, as ``preference.alarm.max_fall``, which only
    warns and is lower; a trial that falls further is stopped; None: no limit."""
    validation: ValidationConfig = ValidationConfig()
    keep: PositiveInt = 1
    """Number of best points whose checkpoints are kept; of all other trials logs and scores stay."""
    max_concurrent: PositiveInt | None = None
    """Most trials at a time; None: as many as the cluster has room for."""

    @model_validator(mode="after")
    def _fits_together(self) -> "SweepConfig":
        if self.score_at != sorted(set(self.score_at)) or self.score_at[-1] != 1.0:
            raise ValueError(f"score_at={self.score_at} must rise and end with 1.0")
        if self.searcher == "grid" and any(d.type != "grid" for d in self.space.values()):
            raise ValueError("searcher grid takes grids alone: give every key of space values with type: grid")
        if self.searcher == "optuna" and len(self.seeds) > 1:
            raise ValueError("searcher optuna learns from single trials: give one seed, and repeat the best with more")
        if "held_out_reward_accuracy" in self.objectives and not self.validation.pairs:
            raise ValueError("held_out_reward_accuracy needs validation.pairs")
        return self


def names_of(sweep: SweepConfig) -> list[str]:
    """Return the names of the objectives, without the minus."""
    return [objective.removeprefix("-") for objective in sweep.objectives]


def mode_of(objective: str) -> Literal["max", "min"]:
    """Return whether a higher or a lower score is better."""
    return "min" if objective.startswith("-") else "max"


def unmeasured(sweep: SweepConfig, suites: Sequence[str]) -> list[str]:
    """Return the objectives that none of these suites measures."""
    found = []
    for name in names_of(sweep):
        suite = name.partition("/")[0] if "/" in name and not name.startswith("pass@") else "accuracy"
        if name not in FROM_LOG and not any(known.partition(":")[0] == suite.partition(":")[0] for known in suites):
            found.append(name)
    return found


FIXED = ("name", "output", "ray", "rounds", "engine", "eval", "sweep")
"""Sections that are the same in all trials."""


def space_problems(config: Any) -> Iterator[tuple[str, str]]:
    """Return (key, problem) for every wrong key or value of a configuration's search space."""
    for key, dimension in config.sweep.space.items():
        problem = _without_stage(config, key) or _unknown(config, key) or _without_effect(config, key)
        if problem:
            yield key, problem
            continue
        for value in [dimension.low, dimension.high] if isinstance(dimension, LogUniform) else dimension.values:
            try:
                with_values(config, {key: value})
            except ValidationError as error:
                yield key, f"{value!r} can't be its value: {error.errors()[0]['msg']}"
                break


def _without_stage(config: Any, key: str) -> str | None:
    if config.sft is None and key.partition(".")[0] == "sft":
        return "there is no SFT stage whose settings could vary: remove the key, or sft: null"
    return None


def _unknown(config: Any, key: str) -> str | None:
    node, parts = config, key.split(".")
    for i, part in enumerate(parts):
        known = list(node if isinstance(node, dict) else getattr(type(node), "model_fields", {}))
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
            if near:
                return f"unknown key; did you mean {'.'.join([*parts[:i], near[0]])!r}?"
            return f"unknown key; known there: {', '.join(sorted(known)) or 'nothing'}"
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return None


def _without_effect(config: Any, key: str) -> str | None:
    first, *rest = key.split(".")
    if first in FIXED:
        return "is the same for all trials: vary data, model, sft, preference, the method"
    if first == "methods" and rest[:1] != [config.sweep.method]:
        return f"the trials train methods.{config.sweep.method} alone: set sweep.method"
    return None
