"""Finished runs and sweeps, read back from their folders; nothing is computed, and no cluster is started."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.evaluate.evaluations import Evaluation
from spo_ray.report.run_page import write_report
from spo_ray.report.sweep import write_sweep_report
from spo_ray.runtime.artifact import MANIFEST, Artifact
from spo_ray.runtime.run import Run
from spo_ray.sweep.results import ROW, Ranked, Row, rank, rows_of
from spo_ray.sweep.space import run_for
from spo_ray.sweep.trial import TRAINING

CONFIG = "config.json"


class Trials(NamedTuple):
    """What a sweep has besides a run's results."""

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


def read(folder: Path) -> Finished:
    """A finished run's artifacts.

    Raises:
        UserError: there is no such folder, it is no run's, the run is unfinished, or something in it leads out of it.
    """
    run = _run(folder)
    names = {path.parent.name for path in run.root.glob(f"*/{MANIFEST}")}
    stages = {name: _stage(run.root, name) for name in sorted(names)}
    trials = _trials(run, stages) if (run.root / "results.csv").exists() else None
    if trials:
        trained = trials.artifact.path
        methods = {
            f"trial_{row['trial']}": Artifact(
                trained / row["trial"] / TRAINING, f"{trials.artifact.digest}/{row['trial']}"
            )
            for row in trials.best.rows
            if trials.best.finished
        }
        start = run_for(run, trials.best.values).root
        held_out = _stage(start, "data_test")
        evaluation = _evaluation(run, stages, methods) if methods else None
        return Finished(run, methods, evaluation, None, held_out, trials)
    suffix = f"_round{run.config.rounds}" if run.config.rounds > 1 else ""
    methods = {name: _take(run, stages, f"method_{name}{suffix}") for name in run.config.methods}
    pairs, held_out = _take(run, stages, "pairs"), _take(run, stages, "data_test")
    return Finished(run, methods, _evaluation(run, stages, methods), pairs, held_out)


def rewrite(found: Finished) -> None:
    """Write a run's own page anew, also where it is there.

    Raises:
        UserError: another process is at work in the folder.
    """
    run, evaluation, trials = found.run, found.evaluation, found.trials
    with run.locked():
        (run.root / "report" / MANIFEST).unlink(missing_ok=True)  # else the stage is reused
        if trials:
            write_sweep_report(run, trials.artifact, trials.best, evaluation)
        elif evaluation and found.pairs:
            write_report(run, found.methods, evaluation, found.pairs, found.held_out)


def _run(folder: Path) -> Run:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: name a run's folder, such as runs/quickstart")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run's folder: it has no {CONFIG}")
    try:
        run = Run(Config.model_validate_json((folder / CONFIG).read_text()))
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / CONFIG} is no configuration of this version of spo_ray: {error}") from error
    run.root = folder.resolve()  # wherever it was moved to: the configuration's output and name are not followed
    return run


def _stage(root: Path, name: str) -> Artifact:
    """A finished stage that is what its name says and lies in its run's folder."""
    folder = root / name
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        stage, digest = manifest["stage"], str(manifest["digest"])
    except FileNotFoundError as error:
        raise UserError(_unfinished(root, name)) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} can't be read: {type(error).__name__}: {error}") from error
    if stage != name:
        raise UserError(f"{folder / MANIFEST} is the manifest of {stage!r}: nothing that it names is followed")
    for path in (folder, *folder.iterdir()):
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{path} leads out of the run's folder, to {path.resolve()}: it is not followed")
    return Artifact(folder, digest)


def _take(run: Run, stages: Mapping[str, Artifact], name: str) -> Artifact:
    if name not in stages:
        raise UserError(_unfinished(run.root, name))
    return stages[name]


def _unfinished(root: Path, name: str) -> str:
    return f"{root} is not finished, it has no stage {name}: run it again, finished stages are reused"


def _evaluation(run: Run, stages: Mapping[str, Artifact], methods: Mapping[str, Artifact]) -> Evaluation:
    """What was measured, if it was measured of these checkpoints."""
    scores, comparisons = _take(run, stages, "scores"), _take(run, stages, "comparisons")
    known = {artifact.digest for artifact in stages.values()}
    stale = [a.path.name for a in (scores, comparisons) if not known.issuperset(_inputs(a).values())]
    answers: dict[str, Artifact] = {}
    for name in dict.fromkeys(row["checkpoint"] for row in scores.rows()):
        for suite in (f"eval_{name}", f"health_{name}"):
            if suite in stages and name in methods and _inputs(stages[suite]).get("model") != methods[name].digest:
                stale.append(suite)
        if f"accuracy_{name}" in _inputs(scores):
            answers[name] = _take(run, stages, f"eval_{name}")
    stale += [f"eval_{name}" for name in methods if answers and name not in answers]
    if stale:
        raise UserError(
            f"{run.root} is not finished, {stale[0]} is older than what it was made from: run it again, finished "
            "stages are reused"
        )
    return Evaluation(scores, comparisons, answers)


def _inputs(artifact: Artifact) -> dict[str, Any]:
    return artifact.manifest["inputs"]


def _trials(run: Run, stages: Mapping[str, Artifact]) -> Trials:
    if run.config.sweep is None:
        raise UserError(f"{run.root} has a sweep's results.csv, but its {CONFIG} has no section sweep")
    artifact = _take(run, stages, "trials")
    for path in artifact.path.glob(f"*/{ROW}"):
        if json.loads(path.read_text())["trial"] != path.parent.name or not _within(path, run.root):
            raise UserError(f"{path} leads out of its folder: it is not followed")
    rows = rows_of(artifact)
    return Trials(artifact, rows, rank(rows, run.config.sweep)[0])


def _within(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root)


def labels(runs: Iterable[Finished]) -> list[str]:
    """Names to tell runs in different folders apart: the folders', with as much of the way there as is needed."""
    parts = [found.run.root.parts for found in runs]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
