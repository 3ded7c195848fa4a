"""Finished runs and sweeps, read back from their folders by the functions that made them."""

import json
from pathlib import Path

from pydantic import ValidationError

from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.evaluate.evaluations import Evaluation
from spo_ray.pipeline.job import run_job
from spo_ray.pipeline.sweep_job import run_sweep
from spo_ray.report.finished import Finished, Trials
from spo_ray.runtime.run import FinishedRun, Run
from spo_ray.sweep.results import ROW, rows_of

CONFIG = "config.json"


def read_finished(folder: Path) -> Finished:
    """Read a finished run or sweep; nothing is computed, and no cluster is started.

    Raises:
        UserError: there is no such folder, it is no run's, the run is unfinished, or something in it leads out of it.
    """
    found = FinishedRun(_config(folder), folder)
    own = Run(found.config)
    own.root = found.root  # wherever it was moved to: the configuration's output and name are not followed
    if not (found.root / "results.csv").exists():
        job = run_job(found, until="evaluate")
        methods = {name: artifact.present() for name, artifact in job.methods.items()}
        return Finished(own, methods, _present(job.evaluation), job.pairs.present(), job.test.present())
    if found.config.sweep is None:
        raise UserError(f"{found.root} has a sweep's results.csv, but its {CONFIG} has no section sweep")
    for path in (found.root / "trials").glob(f"*/{ROW}"):
        if json.loads(path.read_text())["trial"] != path.parent.name or not path.resolve().is_relative_to(found.root):
            raise UserError(f"{path} leads out of its folder: it is not followed")
    sweep = run_sweep(found)
    trials = Trials(sweep.trials, rows_of(sweep.trials), sweep.best)
    return Finished(own, sweep.checkpoints, _present(sweep.evaluation), None, sweep.start.test.present(), trials)


def _present(evaluation: Evaluation | None) -> Evaluation | None:
    if evaluation is None:
        return None
    answers = {name: artifact.present() for name, artifact in evaluation.answers.items()}
    return Evaluation(evaluation.scores.present(), evaluation.comparisons.present(), answers)


def _config(folder: Path) -> Config:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name a run's folder, such as runs/quickstart")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run's folder: it has no {CONFIG}")
    try:
        return Config.model_validate_json((folder / CONFIG).read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / CONFIG} is no configuration of this version of spo_ray: {error}") from error
