"""The winner: a configuration to run by itself, and its only look at the test split."""

import io
from pathlib import Path

from ruamel.yaml import YAML

from spo_ray.evaluate.evaluations import Evaluation, Evaluations
from spo_ray.progress import say
from spo_ray.run import Artifact, Run
from spo_ray.sweep.results import Ranked, rank, rows_of
from spo_ray.sweep.shared import prepare, run_for
from spo_ray.sweep.space import sweep_of, trial_config
from spo_ray.sweep.trial import TRAINING

BEST = "best.yaml"


def winner(run: Run, trials: Artifact) -> Ranked:
    """The best point; see :func:`spo_ray.sweep.results.rank`."""
    return rank(rows_of(trials), sweep_of(run.config))[0]


def write_best(run: Run, best: Ranked) -> Path:
    """Write ``best.yaml``: the run without the sweep, with the winner's values."""
    config = trial_config(run.config, best.values, run.config.seed)
    tree = config.model_copy(update={"name": f"{config.name}-best"}).model_dump(mode="json", exclude={"sweep"})
    sweep = sweep_of(run.config)
    means = ", ".join(f"{name} {value:.4g}" for name, value in zip(sweep.objectives, best.means, strict=True))
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(tree, text)
    path = run.root / BEST
    path.write_text(f"# The best of the sweep {config.name} on its validation rows: {means}\n{text.getvalue()}")
    return path


def evaluate_best(run: Run, trials: Artifact, best: Ranked) -> Evaluation | None:
    """The winner's trials and the SFT model that they started from, on the test split; None where no trial finished."""
    if not best.finished:
        say("best", "no trial finished: the test split stays untouched")
        return None
    start = prepare(run_for(run, best.values))
    checkpoints = {"sft": start.sft} | {
        f"trial_{row['trial']}": Artifact(trials.path / row["trial"] / TRAINING, f"{trials.digest}/{row['trial']}")
        for row in best.rows
    }
    with Evaluations(run, start.test) as evaluations:
        return evaluations.finish(checkpoints)
