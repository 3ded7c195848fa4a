"""A sweep: what trials share, the trials under Ray Tune, the best on the test split, the sensitivity report.

    python pipelines/sweep.py --config configs/sweeps/toy.yaml [key=value ...]

Trials are scored on validation questions that are kept out of training; the test split is answered once, by the best.
"""

import sys
from collections.abc import Iterator

from spo_ray.cli import script
from spo_ray.cluster import connect
from spo_ray.preflight import preflight
from spo_ray.run import Run
from spo_ray.sweep.best import evaluate_best, winner, write_best
from spo_ray.sweep.outline import sweep_outline
from spo_ray.sweep.report import write_sweep_report
from spo_ray.sweep.results import rows_of, write_csv
from spo_ray.sweep.space import listed_points, sweep_of
from spo_ray.sweep.tuner import run_trials, starts


def stages(run: Run) -> Iterator[str]:
    """The sweep; the name of each finished part is yielded, so that a caller can stop there."""
    if sweep_of(run.config).searcher.type != "optuna":
        listed_points(run.config)  # refuses values that don't go together
    preflight(run.config)
    connect(run.config)
    known = starts(run)
    yield "reference"

    trials = run_trials(run, known)
    write_csv(run.root / "results.csv", rows_of(trials), sweep_of(run.config))
    yield "trials"

    best = winner(run, trials)
    write_best(run, best)
    tested = evaluate_best(run, trials, best)
    yield "evaluate"

    write_sweep_report(run, trials, best, tested)
    yield "report"


if __name__ == "__main__":
    sys.exit(script(stages, "report", "A sweep, from the shared stages to the sensitivity report.", sweep_outline))
