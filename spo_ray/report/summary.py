"""Finished runs, and ``summary.json``: the results of every checkpoint, read from the stages' files."""

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spo_ray import __version__
from spo_ray.evaluate.accuracy import accuracies
from spo_ray.evaluate.evaluations import Evaluation
from spo_ray.evaluate.statistics import share
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.console import in_units
from spo_ray.runtime.manifest import manifests
from spo_ray.runtime.run import Run
from spo_ray.runtime.status import STATUS, read_status, seconds_of
from spo_ray.train.spec import RESULT

if TYPE_CHECKING:  # Ray Tune, which only sweeps need, takes long to import
    from spo_ray.sweep.results import Ranked, Row

NO_CHANGE = {"delta_logp_chosen": None, "delta_logp_rejected": None}
NO_ROWS = Artifact(Path(os.devnull), "")
UNMEASURED = Evaluation(NO_ROWS, NO_ROWS, {})
"""Of a sweep of which no trial finished."""


class Trials(NamedTuple):
    """The trials of a sweep, which a run does not have."""

    artifact: Artifact
    rows: "list[Row]"
    best: "Ranked"


class Finished(NamedTuple):
    """One finished run."""

    run: Run
    methods: dict[str, Artifact]
    """Trained checkpoints by their names in the evaluation; of a sweep those of the best point's trials."""
    evaluation: Evaluation
    held_out: Artifact
    """Questions or pairs of the evaluation."""
    pairs: Artifact = NO_ROWS
    """Training pairs as text; none for a sweep, whose trials may have different ones."""
    trials: Trials | None = None


def summarise(found: Finished) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    ``methods`` has for each checkpoint ``accuracy_greedy`` and ``accuracy_sampled`` (None without graded answers), the
    change of log-probabilities on the training pairs, ``held_out`` with the share of held-out pairs whose chosen
    response gained more than the rejected one, and ``scores`` with all metrics. ``comparisons`` has the paired tests.
    """
    evaluation, scores, table = found.evaluation, found.evaluation.scores.rows(), {}
    for name in dict.fromkeys([*(score["checkpoint"] for score in scores), *found.methods]):
        entry = {"accuracy_greedy": None, "accuracy_sampled": None, **NO_CHANGE}
        if name in evaluation.answers:
            entry |= accuracies(evaluation.answers[name].rows())
        if name in found.methods:
            entry |= _log_probabilities(found.methods[name].path)
        own = [score for score in scores if score["checkpoint"] == name]
        entry["scores"] = {f"{score['suite']}/{score['metric']}": figures(score) for score in own}
        table[name] = entry
    return {
        "run": found.run.config.name,
        "seed": found.run.config.seed,
        "methods": table,
        "comparisons": evaluation.comparisons.rows(),
        "versions": versions_of(found.run),
    }


def origin(run: Run) -> str:
    """Return a sentence that says when a run was made, with which version, on what hardware, and how long it took.

    The day and the time are those of ``status.json``, and left out without one.
    """
    status, day, took = read_status(run.root / STATUS), "", ""
    with suppress(LookupError, TypeError, ValueError, OverflowError, OSError):
        day = f" on {datetime.fromtimestamp(status['started'], UTC):%-d %B %Y}"
        took = f"; took {in_units(seconds_of(status), 'seconds') or '0 s'}"
    took += " in several attempts" if took and status.get("earlier_s") else ""
    used = [manifest.get("conditions", {}).get("hardware") for _, manifest in manifests(run.root)]
    hardware = " and ".join(dict.fromkeys(filter(None, used))) or "unknown hardware"
    return f"Made{day} with spo_ray {versions_of(run).get('spo_ray', __version__)} on {hardware}{took}."


def versions_of(run: Run) -> dict[str, str]:
    """Return the package versions that the run's stages were built with; all of them if they changed in between."""
    found: dict[str, dict[str, None]] = {}
    for _, manifest in sorted(manifests(run.root), key=lambda one: one[0]):
        for name, version in manifest["versions"].items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(each) for name, each in found.items()}


def figures(score: dict[str, Any]) -> dict[str, Any]:
    """Return the value of a score, its interval and counts; without those that it does not have."""
    names = ("value", "low", "high", "std", "n", "seeds")
    return {name: score[name] for name in names if score[name] not in (None, [])}


def _log_probabilities(checkpoint: Path) -> dict[str, Any]:
    result = json.loads((checkpoint / RESULT).read_text())
    found = {key: result["train"][key] for key in NO_CHANGE} | {"pairs": result["train"]["n"], "steps": result["steps"]}
    if held_out := result.get("held_out"):
        reward = {"reward_accuracy": share(held_out["accuracy"], held_out["n"])}
        found["held_out"] = reward | {key: held_out[key] for key in NO_CHANGE}
    return found
