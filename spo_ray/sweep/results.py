"""What came of the trials: one row for each, the ranking, and which checkpoints stay."""

import csv
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ray.tune import Callback, ResultGrid
from ray.tune.experiment import Trial
from ruamel.yaml import YAML

from spo_ray.config.sweep import SweepConfig, mode_of, names_of
from spo_ray.errors import UserError
from spo_ray.runtime.artifact import STEP_LOG, Artifact, write_json
from spo_ray.runtime.console import log
from spo_ray.runtime.run import OpenStage, Run
from spo_ray.sweep.space import Point, point_key, short_names, short_text, sweep_of, trial_config, trial_count
from spo_ray.sweep.trial import FAILED, TRAINING, TRIAL, folder_name, scores
from spo_ray.train.spec import FAILURES, RESULT, failures_of

ROW = "row.json"
LOGS = (STEP_LOG, RESULT, FAILURES)
"""What stays of a training whose checkpoint does not."""
Row = dict[str, Any]
"""A trial: ``trial``, ``values``, ``seed``, ``status`` (finished, stopped, failed), ``reason``, ``steps``, ``share``,
``seconds``, ``restarts``, ``bytes``, ``checkpoint`` and ``scores``, the last ones there are."""


class Ranked(NamedTuple):
    """A point of the search space with its trials."""

    values: dict[str, Any]
    rows: list[Row]
    """Those that finished, or all where none did; by seed."""
    finished: int
    means: tuple[float, ...]
    """Of the objectives over ``rows``; empty where nothing was scored."""


class Progress(Callback):
    """A line for each ended trial; checkpoints that can't be among the best any more are deleted."""

    def __init__(self, folder: Path, sweep: SweepConfig) -> None:
        self.folder, self.sweep = folder, sweep

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See :class:`ray.tune.Callback`."""
        self._ended(trials, trial, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See :class:`ray.tune.Callback`."""
        self._ended(trials, trial, failed=True)

    def _ended(self, trials: list[Trial], trial: Trial, failed: bool) -> None:
        others = {t: t.status == Trial.ERROR for t in trials if t.status in (Trial.TERMINATED, Trial.ERROR)}
        ended = others | {trial: failed}  # whose status changes after this
        folders = {t: self.folder / folder_name(t.config, t.trial_id) for t in ended}
        rows = {t: row_of(folders[t], self.sweep, t.config["point"], lost) for t, lost in ended.items()}
        points = [point_key(row["values"]) for row in one_each(rows.values())]
        decided = [row for row in rows.values() if points.count(point_key(row["values"])) == len(set(self.sweep.seeds))]
        prune(self.folder, decided, rank(decided, self.sweep)[: self.sweep.keep])
        log(f"trial {folders[trial].name}", f"{describe(rows[trial])}; {len(ended)} have ended")


def describe(row: Row) -> str:
    """One line about a trial."""
    names = short_names(row["values"])
    values = ", ".join(f"{names[key]} {short_text(value)}" for key, value in row["values"].items())
    found = ", ".join(f"{key} {short_text(entry['value'])}" for key, entry in row["scores"].items())
    reason = f" ({row['reason']})" if row["reason"] else ""
    return f"{values}, seed {row['seed']}: {row['status']}{reason}{f': {found}' if found else ''}"


def row_of(folder: Path, sweep: SweepConfig, given: Point, failed: bool, error: str = "") -> Row:
    """A trial's row, from its folder; ``given`` is what Ray Tune knows of it, where it failed before it wrote there."""
    file = folder / TRIAL
    point = json.loads(file.read_text()) if file.exists() else given
    records = scores(folder)
    last = records[-1] if records else {"step": 0, "share": 0.0, "seconds": 0.0}
    status, reason = _status(sweep, last, failed, error)
    restarts = sum(failure["restart"] for failure in failures_of(folder / TRAINING))
    return {
        "trial": folder.name,
        "values": point["values"],
        "seed": point["seed"],
        "status": status,
        "reason": reason,
        "steps": last["step"],
        "share": last["share"],
        "seconds": last["seconds"],
        "restarts": restarts,
        "scores": {key: entry for key, entry in last.items() if isinstance(entry, dict) and "value" in entry},
    }


def _status(sweep: SweepConfig, last: Mapping[str, Any], failed: bool, error: str) -> tuple[str, str]:
    if failed:
        return "failed", error
    if last["share"] == 1.0:
        return "finished", ""
    if last.get("stopped"):
        return "stopped", last["stopped"]
    best = f"not in the best 1/{sweep.reduction_factor} at {last['share']:.0%} of the steps"
    return "stopped", f"{sweep.scheduler}: {best}"


def one_each(rows: Iterable[Row]) -> list[Row]:
    """Of trials with equal values and seed one: one that finished, else one with scores, and of these the first."""
    chosen: dict[str, Row] = {}
    given = list(rows)
    for row in sorted(given, key=lambda row: (row["status"] != "finished", not row["scores"], row["trial"])):
        chosen.setdefault(point_key(row["values"], row["seed"]), row)
    return [row for row in given if chosen[point_key(row["values"], row["seed"])] is row]


def rank(rows: Iterable[Row], sweep: SweepConfig) -> list[Ranked]:
    """Points from the best to the worst: first those of which more seeds finished, then by the objectives' means.

    Of equal trials one counts, see :func:`one_each`.
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
    """Delete the checkpoints of all trials but those of the best points, and of trials that equal others."""
    points = {point_key(point.values) for point in best}
    given = list(rows)
    kept = {row["trial"] for row in one_each(given) if point_key(row["values"]) in points}
    for row in given:
        if row["trial"] not in kept:
            strip(folder / row["trial"])


def strip(folder: Path) -> None:
    """Delete what a trial leaves besides logs and scores."""
    for path in (folder / TRAINING).glob("*"):
        if path.name not in LOGS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def close_trials(run: Run, stage: OpenStage, results: ResultGrid) -> list[Row]:
    """Write every trial's ``row.json``, delete what is not kept, and count in the stage's row_counts.

    Raises:
        RuntimeError: some trials have not ended.
        UserError: not one trial was scored.
    """
    sweep, rows = sweep_of(run.config), []
    ended, count = results.num_terminated + results.num_errors, max(len(results), trial_count(run.config))
    if ended < count:
        raise RuntimeError(
            f"Ray Tune was interrupted: {ended} of {count} trials have ended; nothing is lost, the same command goes "
            "on with the others"
        )
    for result in results:
        trial_id = str(Path(result.path).name)
        config = result.config or {}
        folder = stage.scratch / folder_name(config, trial_id)
        folder.mkdir(exist_ok=True)
        failed = folder / FAILED
        error = json.loads(failed.read_text())["error"] if failed.exists() else _first_line(result.error)
        rows.append(row_of(folder, sweep, config["point"], result.error is not None, error))
    if not any(row["scores"] for row in rows):
        raise UserError(f"no trial could be scored, the first: {rows[0]['reason'] if rows else 'there was none'}")
    ranked = rank(rows, sweep)
    kept = {row["trial"] for point in ranked[: sweep.keep] for row in point.rows if row["status"] == "finished"}
    for row in rows:
        folder = stage.scratch / row["trial"]
        shutil.rmtree(folder / TRAINING / "rungs", ignore_errors=True)
        if row["trial"] not in kept:
            strip(folder)
        row["checkpoint"] = row["trial"] in kept and any((folder / TRAINING).glob("model*.safetensors"))
        row["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        write_json(folder / ROW, row)
    known = {row["trial"] for row in rows}
    for folder in stage.scratch.iterdir():  # begun, but lost with a killed driver before Ray Tune noted it
        if folder.is_dir() and folder.name not in known and (folder / TRIAL).exists():
            shutil.rmtree(folder)
    stage.counts.read = len(rows)
    stage.counts.kept = sum(row["status"] == "finished" for row in rows)
    stage.counts.facts["bytes"] = sum(row["bytes"] for row in rows)
    stage.counts.facts |= {s: sum(row["status"] == s for row in rows) for s in ("finished", "stopped", "failed")}
    return rows


def _first_line(error: BaseException | None) -> str:
    lines = [line for line in str(error or "").splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else ""


def rows_of(trials: Artifact) -> list[Row]:
    """All trials of a finished sweep, in their order."""
    return [json.loads(path.read_text()) for path in sorted(trials.path.glob(f"*/{ROW}"))]


def write_csv(path: Path, rows: Sequence[Row], sweep: SweepConfig) -> None:
    """``results.csv``: one row a trial, its values by their dotted keys, scores with their intervals."""
    keys = list(sweep.space)
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    plain = ["trial", "seed", "status", "reason", "steps", "seconds", "restarts", "bytes"]
    parts = [(name, part) for name in names for part in ("value", "low", "high")]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*plain[:1], *keys, *plain[1:], *(n if p == "value" else f"{n}_{p}" for n, p in parts)])
        for row in rows:
            found = [row["scores"].get(name, {}).get(part, "") for name, part in parts]
            values = [row["values"].get(key, "") for key in keys]
            writer.writerow([row["trial"], *values, *(row[key] for key in plain[1:]), *found])


BEST = "best.yaml"


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
