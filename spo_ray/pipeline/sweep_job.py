"""A sweep, in order: shared stages, trials under Ray Tune, evaluation of the best point, sensitivity report.

Trials are scored on validation rows, which are kept out of training. Only the best point is evaluated on the test
split.
"""

from dataclasses import dataclass, field

from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.evaluate.evaluations import Evaluation, Evaluations
from spo_ray.pipeline.checks import preflight
from spo_ray.pipeline.job import prepare
from spo_ray.report.summary import UNMEASURED
from spo_ray.report.sweep import write_sweep_report
from spo_ray.runtime.artifact import Artifact, PlannedArtifact
from spo_ray.runtime.cluster import connect
from spo_ray.runtime.console import log
from spo_ray.runtime.run import PlannedRun, Run, Stage, Work, never_built
from spo_ray.sweep.results import Ranked, rank, rows_of, write_best, write_csv
from spo_ray.sweep.space import listed_points, run_for, start_key, sweep_of
from spo_ray.sweep.trial import TRAINING
from spo_ray.sweep.tuner import run_trials, starts
from spo_ray.train.spec import Prepared


@dataclass
class Sweep:
    """The results of a sweep."""

    trials: Artifact = field(init=False)
    best: Ranked = field(init=False)
    start: Prepared = field(init=False)
    """Start of the best point's trials."""
    checkpoints: dict[str, Artifact] = field(default_factory=dict)
    """Trained checkpoints of the best point by trial; empty if no trial finished."""
    evaluation: Evaluation = UNMEASURED
    """Metrics of these checkpoints on the test split, if a trial finished."""


def run_sweep(run: Run) -> Sweep:
    """Run a sweep and return its results; for a plan, ``best`` and ``start`` are set only if the trials are finished.

    Raises:
        UserError: the sweep can't run as configured, or the cluster is too small for it.
    """
    if run.mode == "execute":
        plan = plan_sweep(run.config, verify=run.verify)
        if plan.problem:
            raise UserError(plan.problem)
        run.planned = plan.planned
        connect(run.config, run.planned)
    sweep, known = Sweep(), starts(run, prepare_start)
    sweep.trials = run_trials(run, known, prepare_start)
    if isinstance(sweep.trials, PlannedArtifact):  # which checkpoints are evaluated depends on the trials
        unknown = PlannedArtifact(run.root, "")
        inputs = {"trials": sweep.trials, "scores": unknown, "comparisons": unknown}
        run.execute(Stage("report", never_built, inputs=inputs, work=Work(note="a page")))
        return sweep
    rows = rows_of(sweep.trials.present())
    sweep.best = rank(rows, sweep_of(run.config))[0]
    if run.mode == "execute":
        write_csv(run.root / "results.csv", rows, sweep_of(run.config))
        write_best(run, sweep.best)
    values = sweep.best.values
    sweep.start = known.get(start_key(values)) or prepare_start(run_for(run, values))
    evaluate_best(run, sweep)
    if run.mode != "read":
        write_sweep_report(run, sweep.trials, sweep.best, sweep.evaluation)
    return sweep


def plan_sweep(config: Config, *, verify: bool = False) -> PlannedRun:
    """Return the plan of a sweep; if the sweep would be refused, ``problem`` of the plan has the reason."""
    plan = PlannedRun(config, verify=verify)
    with plan.noting_problems():
        if sweep_of(config).searcher != "optuna":
            listed_points(config)  # refuses values that don't go together
        preflight(config)
    with plan.noting_problems():
        run_sweep(plan)
    return plan


def prepare_start(run: Run) -> Prepared:
    """Execute the job up to the reference log-probabilities; validation rows are kept out of the training data."""
    start = Prepared(run.config)
    for _ in prepare(run, start, sweep_of(run.config).validation):
        pass
    return start


def evaluate_best(run: Run, sweep: Sweep) -> None:
    """Evaluate the best point's trials and the checkpoint that they start from on the test split."""
    best, trials = sweep.best, sweep.trials
    if not best.finished:  # they have no checkpoints
        log("best", "no trial finished, so nothing is measured on the test split")
        return
    sweep.checkpoints = {
        f"trial_{row['trial']}": Artifact(trials.path / row["trial"] / TRAINING, f"{trials.digest}/{row['trial']}")
        for row in best.rows
    }
    with Evaluations(run) as evaluations:
        reference = {run.config.reference: sweep.start.policy}
        sweep.evaluation = evaluations.finish(sweep.start.test, reference | sweep.checkpoints)
