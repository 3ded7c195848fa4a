"""What a trial's checkpoint is worth: the suites on the validation rows, and its log-probabilities of pairs."""

import copy
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from spo_ray.core.stats import share
from spo_ray.evaluate.evaluations import suite_of
from spo_ray.evaluate.suite import Bench
from spo_ray.run import STEP_LOG, Artifact, Run, read_lines

Record = dict[str, Any]
"""Scores behind a step by their names, each with ``value``, and ``low`` and ``high`` where it has an interval."""
AGAINST_OTHERS = "alpaca_eval"
"""The suite that gets its figures from other models' judgements."""


@dataclass(frozen=True)
class OneActor:
    """The part of :class:`spo_ray.evaluate.actors.Actors` that suites need, for an actor that trials share."""

    kind: str

    def close(self) -> None:
        """Nothing: others use it too."""


def score_texts(
    run: Run, actor: Any, kind: str, name: str, checkpoint: Artifact, data: Artifact, scratch: Path
) -> Record:
    """What the suites of ``eval`` measure of a checkpoint, through one evaluation actor; ``scratch`` is deleted."""
    own = copy.copy(run)
    own.root = scratch

    def call(method: str, *arguments: Any) -> Any:
        return ray.get(getattr(actor, method).remote(*arguments))

    actors: Any = OneActor(kind)
    bench, record = Bench(own, data, actors, call), {}
    for suite_name in own.config.eval.chosen(own.config.data):
        suite = suite_of(suite_name)
        found = suite.measure(bench, name, checkpoint)
        others = []
        if suite.conclude and suite_name == AGAINST_OTHERS:
            others = suite.conclude(bench, {name: checkpoint}, {name: found})[name]
        prefix = "" if suite_name == "accuracy" else f"{suite_name}/"
        for e in suite.estimate(own.config.eval, found, others):
            entry = {"value": e.value, "low": e.low, "high": e.high, "n": e.n}
            record[f"{prefix}{e.metric}"] = {key: value for key, value in entry.items() if value is not None}
    shutil.rmtree(scratch)
    return record


def score_log(out: Path, step: int) -> Record:
    """Log-probability measures behind a step, from the step log: of the probe pairs, and of the held-out ones."""
    line = read_lines(out / STEP_LOG)[step]
    found: Record = {key: {"value": line[f"probe/{key}"]} for key in ("delta_logp_chosen", "delta_logp_rejected")}
    for name, pairs in (("reward_accuracy", "probe"), ("held_out_reward_accuracy", "held_out")):
        if f"{pairs}/n" in line:
            found[name] = share(line[f"{pairs}/accuracy"], round(line[f"{pairs}/n"]))
    return found


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The scores alone, for schedulers and searchers."""
    return {key: entry["value"] for key, entry in record.items() if isinstance(entry, dict) and "value" in entry}
