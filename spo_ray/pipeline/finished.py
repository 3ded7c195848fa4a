"""Reads finished runs and sweeps from their folders, by the functions that made them."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spo_ray import __version__
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.evaluate.evaluations import Evaluation
from spo_ray.pipeline.job import run_job
from spo_ray.pipeline.sweep_job import run_sweep
from spo_ray.report.summary import Finished, Trials
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.finished_run import FinishedRun
from spo_ray.runtime.run import Run
from spo_ray.sweep.results import ROW, rows_of

CONFIG = "config.json"


def read_finished(folder: Path, *, verify: bool = False) -> Finished:
    """Return the results of a finished run or sweep; computes nothing and starts no cluster.

    ``verify`` compares the contents of files too, see :class:`spo_ray.runtime.run.Run`.

    Raises:
        UserError: the folder is missing or no run's, the run is unfinished or damaged, or something in it leads out of
            it.
    """
    tree = _read(folder)
    own = Run(_validated(folder, tree), verify=verify)
    found = FinishedRun(read_config(folder), folder, verify=verify)
    own.root = found.root  # the folder may have been moved: the configuration's output and name are not used
    if not (found.root / "results.csv").exists():
        job = run_job(found, until="evaluate")
        methods = {name: _of_configuration(own, name, artifact) for name, artifact in job.methods.items()}
        return Finished(own, methods, _present(job.evaluation), job.test.present(), job.pairs.present())
    if found.config.sweep is None:
        raise UserError(f"{found.root} has a sweep's results.csv, but its {CONFIG} has no section sweep")
    for path in (found.root / "trials").glob(f"*/{ROW}"):
        try:
            name = json.loads(path.read_text())["trial"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} can't be read ({type(error).__name__}): run the sweep again") from error
        if name != path.parent.name or not path.resolve().is_relative_to(found.root):
            raise UserError(f"{path} leads out of its folder: it is not followed")
    sweep = run_sweep(found)
    trials = Trials(sweep.trials, rows_of(sweep.trials), sweep.best)
    return Finished(own, sweep.checkpoints, _present(sweep.evaluation), sweep.start.test.present(), trials=trials)


def read_config(folder: Path) -> Config:
    """Return the configuration of a run, finished or not, without what only a run needs.

    Raises:
        UserError: the folder is missing or no run's.
    """
    return _validated(folder, _unbuilt(_read(folder)))


def _present(evaluation: Evaluation) -> Evaluation:
    answers = {name: artifact.present() for name, artifact in evaluation.answers.items()}
    return Evaluation(evaluation.scores.present(), evaluation.comparisons.present(), answers)


def _of_configuration(run: Run, name: str, artifact: Artifact) -> Artifact:
    """Return a trained checkpoint.

    Raises:
        UserError: it is missing, or was trained before the run's settings were changed.
    """
    manifest = artifact.present().manifest
    trained, config = manifest.get("config", {}), run.config
    sections = {"method": config.methods[name], "preference": config.preference}
    now = {key: section.model_dump(mode="json") for key, section in sections.items()}
    changed = [key for key in now if trained.get(key, now[key]) != now[key]]
    if changed and manifest.get("version") == __version__:
        raise UserError(
            f"{run.root} is not finished, {artifact.path.name} was trained with other settings of {changed[0]} than "
            f"{CONFIG} has: run it again, finished stages are reused"
        )
    return artifact


def _unbuilt(value: Any) -> Any:
    """Return a JSON configuration without references to vLLM, code of verifiers and files of tasks.

    Reading a run must not need vLLM nor import a module that the folder names.
    """
    if isinstance(value, list):
        return [_unbuilt(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _unbuilt(item) for key, item in value.items()}
    kept |= {"type": "auto"} if kept.get("type") == "vllm" else {}
    kept |= {"verifier": "gsm8k"} if "verifier" in kept else {}
    return kept | ({"include_path": None} if "include_path" in kept else {})


def _read(folder: Path) -> Any:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name a run's folder, such as runs/quickstart")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run's folder: it has no {CONFIG}")
    try:
        return json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} can't be read: {error}") from error


def _validated(folder: Path, tree: Any) -> Config:
    try:
        return Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG} is no configuration of this version of spo_ray: {error}") from error
