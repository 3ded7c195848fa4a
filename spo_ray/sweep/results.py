"""Results of the trials: one row for each, the ranking of points, and which checkpoints are kept."""

import csv
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from ray.exceptions import RayTaskError
from ray.tune import Callback, ResultGrid
from ray.tune.experiment import Trial
from ruamel.yaml import YAML

from spo_ray.config.sweep import SweepConfig, mode_of, names_of
from spo_ray.errors import EvaluatorLostError, UserError
from spo_ray.runtime.artifact import STEP_LOG, Artifact, write_json
from spo_ray.runtime.console import log
from spo_ray.runtime.run import OpenStage, Run
from spo_ray.sweep.space import Point, point_key, short_names, short_text, sweep_of, trial_config, trial_count
from spo_ray.sweep.trial import FAILED, TRAINING, TRIAL, Scores, folder_name, scores, scores_in
from spo_ray.train.spec import FAILURES, RESULT, failures_of

ROW, BEST = "row.json", "best.yaml"
LOGS = (STEP_LOG, RESULT, FAILURES)
"""Files of a training that stay when its checkpoint is deleted."""
Status = Literal["finished", "stopped", "failed"]


class Row(TypedDict):
    """One trial; ``row.json`` in its folder."""

    trial: str
    """Name of its folder."""
    values: dict[str, Any]
    """Values by dotted keys of the configuration."""
    seed: int
    status: Status
    reason: str
    """Why the trial was stopped or failed; empty if it finished."""
    steps: int
    """Steps at the last score."""
    share: float
    """The same as a share of all steps."""
    seconds: float
    restarts: int
    """Restarts of its training workers."""
    scores: Scores
    """Last scores; empty if there are none."""
    checkpoint: NotRequired[bool]
    """True if the checkpoint is kept; like ``bytes`` set at the end of the sweep."""
    bytes: NotRequired[int]
    """Size of the trial's folder."""


class Ranked(NamedTuple):
    """A point of the search space with its trials."""

    values: dict[str, Any]
    rows: list[Row]
    """Finished trials by seed; if none finished, all trials with scores."""
    finished: int
    """Number of finished trials."""
    means: tuple[float, ...]
    """Means of the objectives over ``rows``; empty if there are no scores."""


class Progress(Callback):
    """Logs a line for each trial that ends, and deletes checkpoints that can't be among the best any more.

    Ends the sweep where a trial has lost its evaluation actor, since the other trials would be trained in vain.
    """

    def __init__(self, folder: Path, sweep: SweepConfig) -> None:
        self.folder, self.sweep = folder, sweep

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See :class:`ray.tune.Callback`."""
        self._ended(trials, trial, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See :class:`ray.tune.Callback`."""
        _require_evaluator(trial)
        self._ended(trials, trial, failed=True)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See :class:`ray.tune.Callback`."""
        _require_evaluator(trial)

    def _ended(self, trials: list[Trial], trial: Trial, failed: bool) -> None:
        ended = {t: t.status == Trial.ERROR for t in trials if t.status in (Trial.TERMINATED, Trial.ERROR)}
        ended[trial] = failed  # its status changes after this call
        rows = {t: self._row(t, lost) for t, lost in ended.items()}
        seeds = Counter(point_key(row["values"]) for row in one_each(rows.values()))
        decided = [row for row in rows.values() if seeds[point_key(row["values"])] == len(set(self.sweep.seeds))]
        prune(self.folder, decided, rank(decided, self.sweep)[: self.sweep.keep])
        log(f"trial {rows[trial]['trial']}", f"{describe(rows[trial])}; {len(ended)} have ended")

    def _row(self, trial: Trial, failed: bool) -> Row:
        return row_of(
            self.folder / folder_name(trial.config, trial.trial_id), self.sweep, trial.config["point"], failed
        )


def _require_evaluator(trial: Trial) -> None:
    """Raise an EvaluatorLostError if a trial failed with one; Ray Tune then leaves it unfinished."""
    error = trial.get_pickled_error()
    if isinstance(error, RayTaskError) and isinstance(error.cause, EvaluatorLostError):
        raise EvaluatorLostError(f"{error.cause} No result is lost: the same command resumes the sweep.")


def describe(row: Row) -> str:
    """Return one line about a trial for the log."""
    names = short_names(row["values"])
    values = ", ".join(f"{names[key]} {short_text(value)}" for key, value in row["values"].items())
    found = ", ".join(f"{key} {short_text(entry['value'])}" for key, entry in row["scores"].items())
    reason = f" ({row['reason']})" if row["reason"] else ""
    return f"{values}, seed {row['seed']}: {row['status']}{reason}{f': {found}' if found else ''}"


def row_of(folder: Path, sweep: SweepConfig, given: Point, failed: bool, error: str = "") -> Row:
    """Return the row of a trial from its folder.

    ``given`` is the point as Ray Tune knows it, for a trial that failed before it wrote ``trial.json``; ``error`` is
    the reason of a failed trial.
    """
    file = folder / TRIAL
    point = json.loads(file.read_text()) if file.exists() else given
    records = scores(folder)
    last = records[-1] if records else {"step": 0, "share": 0.0, "seconds": 0.0}
    status, reason = _status(sweep, last, failed, error)
    return {
        "trial": folder.name,
        "values": point["values"],
        "seed": point["seed"],
        "status": status,
        "reason": reason,
        "steps": last["step"],
        "share": last["share"],
        "seconds": last["seconds"],
        "restarts": sum(failure["restart"] for failure in failures_of(folder / TRAINING)),
        "scores": scores_in(last),
    }


def _status(sweep: SweepConfig, last: Mapping[str, Any], failed: bool, error: str) -> tuple[Status, str]:
    if failed:
        return "failed", error
    if last["share"] == 1.0:
        return "finished", ""
    if last.get("stopped"):
        return "stopped", last["stopped"]
    best = f"not in the best 1/{sweep.reduction_factor} at {last['share']:.0%} of the steps"
    return "stopped", f"{sweep.scheduler}: {best}"


def one_each(rows: Iterable[Row]) -> list[Row]:
    """Return one row for each combination of values and seed: a finished one, else one with scores, else the first."""
    chosen: dict[str, Row] = {}
    given = list(rows)
    for row in sorted(given, key=lambda row: (row["status"] != "finished", not row["scores"], row["trial"])):
        chosen.setdefault(point_key(row["values"], row["seed"]), row)
    return [row for row in given if chosen[point_key(row["values"], row["seed"])] is row]


def rank(rows: Iterable[Row], sweep: SweepConfig) -> list[Ranked]:
    """Return the points from best to worst: by the number of finished seeds, then by the objectives' means.

    Equal trials count once, see :func:`one_each`.
    """
    points: dict[str, list[Row]] = {}
    for row in one_each(rows):
        points.setdefault(point_key(row["values"]), []).append(row)
    found = []
    for group in points.values():
        done = sorted((row for row in group if row["status"] == "finished"), key=lambda row: row["seed"])
        shown = done or [row for row in group if row["scores"]]
        means = tuple(_mean(shown, name) for name in names_of(sweep)) if shown else ()
        found.append(Ranked(group[0]["values"], shown, len(done), means))
    signs = [1.0 if mode_of(objective) == "max" else -1.0 for objective in sweep.objectives]

    def worth(point: Ranked) -> tuple[int, list[float]]:
        return point.finished, [sign * mean for sign, mean in zip(signs, point.means, strict=False)]

    return sorted(found, key=worth, reverse=True)


def _mean(rows: Sequence[Row], objective: str) -> float:
    values = [row["scores"][objective]["value"] for row in rows if objective in row["scores"]]
    return sum(values) / len(values) if values else float("nan")


def prune(folder: Path, rows: Iterable[Row], best: Sequence[Ranked]) -> None:
    """Delete the checkpoints of all given trials but the finished ones of the best points."""
    kept = {row["trial"] for point in best for row in point.rows if row["status"] == "finished"}
    for row in rows:
        for path in (folder / row["trial"] / TRAINING).glob("*"):
            if row["trial"] not in kept and path.name not in LOGS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def close_trials(run: Run, stage: OpenStage, results: ResultGrid) -> list[Row]:
    """Write the ``row.json`` of every trial, delete what is not kept, and count the stage's rows.

    Raises:
        RuntimeError: some trials have not ended.
        UserError: no trial has a score.
    """
    sweep, rows = sweep_of(run.config), []
    ended, count = results.num_terminated + results.num_errors, max(len(results), trial_count(run.config))
    if ended < count:
        raise RuntimeError(
            f"Ray Tune was interrupted: {ended} of {count} trials have ended; nothing is lost, the same command "
            "runs the others"
        )
    for result in results:
        config = result.config or {}
        folder = stage.scratch / folder_name(config, Path(result.path).name)
        folder.mkdir(exist_ok=True)
        failed = folder / FAILED
        error = json.loads(failed.read_text())["error"] if failed.exists() else _last_line(result.error)
        rows.append(row_of(folder, sweep, config["point"], result.error is not None, error))
    if not any(row["scores"] for row in rows):
        raise UserError(
            f"no trial could be scored; the first one failed with: {rows[0]['reason'] if rows else 'there was none'}"
        )
    prune(stage.scratch, rows, rank(rows, sweep)[: sweep.keep])
    for row in rows:
        folder = stage.scratch / row["trial"]
        shutil.rmtree(folder / TRAINING / "rungs", ignore_errors=True)
        row["checkpoint"] = any((folder / TRAINING).glob("model*.safetensors"))
        row["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        write_json(folder / ROW, row)
    known = {row["trial"] for row in rows}
    for folder in stage.scratch.iterdir():  # started, but lost with a killed driver before Ray Tune recorded it
        if folder.is_dir() and folder.name not in known and (folder / TRIAL).exists():
            shutil.rmtree(folder)
    statuses = Counter(row["status"] for row in rows)
    stage.counts.read, stage.counts.kept = len(rows), statuses["finished"]
    stage.counts.facts["bytes"] = sum(row["bytes"] for row in rows)
    stage.counts.facts |= {status: statuses[status] for status in ("finished", "stopped", "failed")}
    return rows


def _last_line(error: BaseException | None) -> str:
    lines = [line for line in str(error or "").splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else ""


def rows_of(trials: Artifact) -> list[Row]:
    """Return all trials of a finished sweep, by the names of their folders."""
    return [json.loads(path.read_text()) for path in sorted(trials.path.glob(f"*/{ROW}"))]


def write_csv(path: Path, rows: Sequence[Row], sweep: SweepConfig) -> None:
    """Write ``results.csv``: one row for each trial, with values by dotted keys and scores with their intervals."""
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    parts = [(name, part) for name in names for part in ("value", "low", "high")]
    plain = ["seed", "status", "reason", "steps", "seconds", "restarts", "bytes"]
    columns = [name if part == "value" else f"{name}_{part}" for name, part in parts]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", *sweep.space, *plain, *columns])
        for row in rows:
            cells: Mapping[str, Any] = {**row}
            values = [row["values"].get(key, "") for key in sweep.space]
            figures = [row["scores"].get(name, {}).get(part, "") for name, part in parts]
            writer.writerow([row["trial"], *values, *(cells[key] for key in plain), *figures])


def write_best(run: Run, best: Ranked) -> Path:
    """Write ``best.yaml``, the configuration of the best point without the section ``sweep``; return its path."""
    config = trial_config(run.config, best.values, run.config.seed)
    tree = config.model_copy(update={"name": f"{config.name}-best"}).model_dump(mode="json", exclude={"sweep"})
    means = zip(sweep_of(run.config).objectives, best.means, strict=True)
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump(tree, text)
    path = run.root / BEST
    told = ", ".join(f"{name} {value:.4g}" for name, value in means)
    path.write_text(f"# The best of the sweep {config.name} on its validation rows: {told}\n{text.getvalue()}")
    return path
