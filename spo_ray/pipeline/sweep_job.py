"""A sweep: what trials share, the trials under Ray Tune, the best on the test split, the sensitivity report.

Trials are scored on validation questions that are kept out of training; the test split is answered once, by the best.
"""

from collections.abc import Iterator

from spo_ray.evaluate.evaluations import Evaluation, Evaluations
from spo_ray.pipeline.checks import preflight
from spo_ray.pipeline.job import prepare
from spo_ray.report.sweep import write_sweep_report
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.cluster import connect
from spo_ray.runtime.console import log
from spo_ray.runtime.run import Run
from spo_ray.sweep.results import Ranked, rows_of, winner, write_best, write_csv
from spo_ray.sweep.space import listed_points, run_for, sweep_of
from spo_ray.sweep.trial import TRAINING
from spo_ray.sweep.tuner import run_trials, starts


def stages(run: Run) -> Iterator[str]:
    """The sweep; the name of each finished part is yielded, so that a caller can stop there."""
    if sweep_of(run.config).searcher.type != "optuna":
        listed_points(run.config)  # refuses values that don't go together
    preflight(run.config)
    connect(run.config)
    known = starts(run, prepare)
    yield "reference"

    trials = run_trials(run, known, prepare)
    write_csv(run.root / "results.csv", rows_of(trials), sweep_of(run.config))
    yield "trials"

    best = winner(run, trials)
    write_best(run, best)
    tested = evaluate_best(run, trials, best)
    yield "evaluate"

    write_sweep_report(run, trials, best, tested)
    yield "report"


def evaluate_best(run: Run, trials: Artifact, best: Ranked) -> Evaluation | None:
    """The winner's trials and the SFT model that they started from, on the test split; None where no trial finished."""
    if not best.finished:
        log("best", "no trial finished: the test split stays untouched")
        return None
    start = prepare(run_for(run, best.values))
    checkpoints = {"sft": start.sft} | {
        f"trial_{row['trial']}": Artifact(trials.path / row["trial"] / TRAINING, f"{trials.digest}/{row['trial']}")
        for row in best.rows
    }
    with Evaluations(run, start.test) as evaluations:
        return evaluations.finish(checkpoints)
