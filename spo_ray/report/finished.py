"""Finished runs and sweeps, read back from their folders; nothing is computed, and no cluster is started."""

import shutil
from collections.abc import Iterable
from typing import NamedTuple

from spo_ray.evaluate.evaluations import Evaluation
from spo_ray.report.run_page import write_report
from spo_ray.report.sweep import write_sweep_report
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.run import Run
from spo_ray.sweep.results import Ranked, Row


class Trials(NamedTuple):
    """The trials of a sweep, which a run does not have."""

    artifact: Artifact
    rows: list[Row]
    best: Ranked


class Finished(NamedTuple):
    """One finished run."""

    run: Run
    methods: dict[str, Artifact]
    """Trained checkpoints by their names in the evaluation; of a sweep those of the best point's trials."""
    evaluation: Evaluation | None
    """None: a sweep of which no trial finished."""
    pairs: Artifact | None
    """Training pairs; None for a sweep, whose trials may have different ones."""
    held_out: Artifact
    trials: Trials | None = None


def rewrite(found: Finished) -> None:
    """Write a run's own page anew, also where it is there.

    Raises:
        UserError: another process is at work in the folder.
    """
    run, evaluation, trials = found.run, found.evaluation, found.trials
    with run.locked():
        shutil.rmtree(run.root / "report", ignore_errors=True)  # else the stage is reused
        if trials:
            write_sweep_report(run, trials.artifact, trials.best, evaluation)
        elif evaluation and found.pairs:
            write_report(run, found.methods, evaluation, found.pairs, found.held_out)


def labels(runs: Iterable[Finished]) -> list[str]:
    """Names to tell runs in different folders apart: the folders', with as much of the way there as is needed."""
    parts = [found.run.root.parts for found in runs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
