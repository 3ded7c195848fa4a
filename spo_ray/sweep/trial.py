"""One trial: a Ray Train run of its own, scored by evaluation actors during training and at the end.

The state of a trial is in its folder: ``trial.json`` has its values, ``scores.jsonl`` one line for each score, and
``training`` what :mod:`spo_ray.train` writes. A trial that is started again resumes from there.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayActorError

from spo_ray.config.sweep import FROM_LOG, SweepConfig, names_of
from spo_ray.errors import TrainingError, UserError
from spo_ray.evaluate.actors import EvaluatorHandle, require_alive
from spo_ray.evaluate.evaluations import suite_of
from spo_ray.evaluate.statistics import share
from spo_ray.evaluate.suite import SuiteContext
from spo_ray.runtime.artifact import STEP_LOG, Artifact, read_lines, write_json
from spo_ray.runtime.console import install
from spo_ray.runtime.heartbeat import report_to
from spo_ray.runtime.run import Run
from spo_ray.sweep.space import Point, run_for, start_key, sweep_of, trial_config
from spo_ray.train.score_gate import decide, decision, rung_folder
from spo_ray.train.spec import Prepared, TrainJob

TRIAL, SCORES, FAILED, TRAINING = "trial.json", "scores.jsonl", "failed.json", "training"
PROGRESS = "progress"
"""Name of the time attribute of schedulers: percent of a trial's steps."""
POLL_S = 0.1
STOP_S = 60
"""Seconds that a stopped training may take to end before its processes are ended with those of the trial."""
Scores = dict[str, dict[str, float]]
"""Scores by name, each with ``value`` and, where known, ``low``, ``high`` and ``n``."""
Record = dict[str, Any]
"""One line of ``scores.jsonl``: scores by name, and ``step``, ``share``, ``seconds``, ``values`` and ``stopped``."""


@dataclass(frozen=True)
class Context:
    """Data that all trials of a sweep have in common."""

    run: Run
    prepare: Callable[[Run], Prepared]
    """Builds what a trial starts from, its checkpoint and pairs, if ``known`` does not have it yet."""
    folder: Path
    """Folder with one folder for each trial."""
    digest: str
    """Digest of the stage ``trials``."""
    known: dict[str, Prepared]
    """Starts of trials by :func:`start_key`."""
    evaluators: list[Any]
    """Handles of the evaluation actors."""
    engine: str
    """Kind of the evaluators' engines."""
    beats: Path | None = None
    """Folder in which the driver watches for processes that stand still."""


def trial(config: dict[str, Any], context: Context) -> None:
    """Run one trial; Ray Tune calls this in a process of its own."""
    # Ray Tune reads this here: a stopped trial ends its training before the process is used again.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(STOP_S)
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # saves a process
    install()
    report_to(context.beats)
    Trial(config["point"], context, folder_name(config, str(tune.get_context().get_trial_id()))).run()


def folder_name(config: Mapping[str, Any], trial_id: str) -> str:
    """Return the name of a trial's folder: its number in the list of trials, else Ray Tune's id."""
    number = config["point"]["number"]
    return trial_id if number is None else f"{number:05d}"


class Trial:
    """One running trial."""

    def __init__(self, point: Point, context: Context, name: str) -> None:
        self.point, self.context, self.name = point, context, name
        self.sweep = sweep_of(context.run.config)
        self.folder = context.folder / name
        self.out = self.folder / TRAINING
        self.started = time.time()
        self.before = 0.0
        """Seconds of earlier attempts."""
        self.error: BaseException | None = None
        """Exception of the training thread."""

    def run(self) -> None:
        """Train, score and report to Ray Tune until the last step, or until the trial is stopped."""
        failed = self.folder / FAILED
        if failed.exists():  # it would fail again
            raise RuntimeError(json.loads(failed.read_text())["error"])
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / TRIAL, {**self.point, "trial_id": tune.get_context().get_trial_id()})
        try:
            self._run()
        except TrainingError as error:
            write_json(failed, {"error": f"{type(error).__name__}: {error}"})
            raise

    def _run(self) -> None:
        start = self._start()
        config = trial_config(start.config, self.point["values"], self.point["seed"])
        settings = config.preference
        shares = steps_of(self.sweep, settings.epochs * -(-start.reference.count // settings.batch_size))
        self._forget_undecided()
        earlier = scores(self.folder)
        self.before = earlier[-1]["seconds"] if earlier else 0.0
        job = TrainJob(
            config=config,
            model=str(start.policy.path),
            rows=start.reference,
            out=str(self.out),
            key=f"trial_{self.name}_{self.context.digest[:12]}",
            method=self.sweep.method,
            held_out=start.held_out,
            score_at=tuple(shares),
        )
        require_alive(self._evaluator())  # else it would be found out after training
        training = threading.Thread(target=self._train, args=(job,), daemon=True)
        training.start()
        try:
            for step, part in shares.items():
                if self._pass(part, step, job, training):
                    break
        finally:
            for step in list(shares)[:-1]:
                if decision(self.out, step) is None:
                    decide(self.out, step, go_on=False)
            training.join(STOP_S)

    def _start(self) -> Prepared:
        values, known = self.point["values"], self.context.known
        if start_key(values) not in known:
            run = run_for(self.context.run, values)
            with run.locked(wait=True):
                known[start_key(values)] = self.context.prepare(run)
        return known[start_key(values)]

    def _forget_undecided(self) -> None:
        """Delete checkpoints that an earlier attempt exported, and its decisions that have no score or were to stop."""
        scored = {record["step"] for record in scores(self.folder)}
        for exported in (path for path in (self.out / "rungs").glob("*") if path.is_dir()):
            shutil.rmtree(exported)  # the step log that it belongs to is written anew
        for file in (self.out / "rungs").glob("step_*.json"):
            step = int(file.stem.removeprefix("step_"))
            if step not in scored or not decision(self.out, step):
                file.unlink()

    def _train(self, job: TrainJob) -> None:
        from spo_ray.train.launch import fit, group_name

        try:
            run = self.context.run.at(self.context.run.root, job.config)
            # Ray Train resumes by this name, so it contains everything that the training depends on.
            identity = json.dumps([self.context.digest, self.name, self.point], sort_keys=True)
            if not job.finished:
                fit(run, [job], [f"trial {self.name}"], group_name(identity), from_files=True)
        except BaseException as error:
            self.error = error

    def _pass(self, part: float, step: int, job: TrainJob, training: threading.Thread) -> bool:
        """Wait for the checkpoint of a step, score it and report; return True if a rule stops the trial there."""
        record = next((known for known in scores(self.folder) if known["step"] == step), None)
        last = part == 1.0
        folder = self.out if last else rung_folder(self.out, step)
        if record is None:
            while not self.error and training.is_alive() and (last or not folder.exists()):
                time.sleep(POLL_S)
            self._check(job, folder)
            record = self._score(part, step, folder)
        elif last:
            training.join()
        stop = bool(record["stopped"])
        if stop:
            decide(self.out, step, go_on=False)
            training.join(STOP_S)
        values = {name: score["value"] for name, score in scores_in(record).items()}
        tune.report({**values, PROGRESS: percent(part), "step": step, "done": last or stop})
        shutil.rmtree(rung_folder(self.out, step), ignore_errors=True)
        if not stop:
            decide(self.out, step, go_on=True)
        return stop

    def _check(self, job: TrainJob, folder: Path) -> None:
        if self.error:
            raise self.error
        if not (job.finished if folder == self.out else folder.exists()):
            raise RuntimeError(f"the training of trial {self.name} ended without a checkpoint to score")

    def _score(self, part: float, step: int, folder: Path) -> Record:
        start, context = self._start(), self.context
        assert start.validation is not None  # SweepConfig requires it
        checkpoint = Artifact(folder, f"{context.digest}/{self.name}/{step}")
        run = context.run.at(context.folder / f".scored_{self.name}_{step}", start.config)
        found, actor = score_log(self.out, step), self._evaluator()
        try:
            found = score_texts(run, actor, context.engine, self.name, checkpoint, start.validation) | found
        except RayActorError:
            require_alive(actor)
            raise
        missing = [name for name in names_of(self.sweep) if name not in found]
        if missing:
            raise UserError(f"sweep.objectives: there is no score {missing[0]}; there are {', '.join(sorted(found))}")
        seconds = round(self.before + time.time() - self.started, 1)
        record: Record = {**found, "step": step, "share": part, "seconds": seconds, "values": self.point["values"]}
        record["stopped"] = None if part == 1.0 else self._stop_reason(found)
        temporary = self.folder / f".{SCORES}"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*scores(self.folder), record]))
        temporary.replace(self.folder / SCORES)
        return record

    def _evaluator(self) -> Any:
        evaluators = self.context.evaluators
        return evaluators[(self.point["number"] or 0) % len(evaluators)]

    def _stop_reason(self, found: Scores) -> str | None:
        fall, limit = -found["delta_logp_chosen_per_token"]["value"], self.sweep.max_fall
        if limit is None or fall <= limit:
            return None
        return f"collapse: log pi(y_w) fell by {fall:.2f} nats per token, more than sweep.max_fall={limit:g}"


def steps_of(sweep: SweepConfig, total: int) -> dict[int, float]:
    """Return shares by the step at which a trial is scored; of several shares at one step the last."""
    return {max(1, round(share * total)): share for share in sweep.score_at}


def percent(share: float) -> float:
    """Return a share of the steps in the unit of schedulers."""
    return round(100 * share, 6)


def scores(folder: Path) -> list[Record]:
    """Return the scores of a trial so far; empty if there are none."""
    return read_lines(folder / SCORES)


def scores_in(record: Record) -> Scores:
    """Return the scores of a record, without its other entries."""
    return {name: entry for name, entry in record.items() if isinstance(entry, dict) and "value" in entry}


AGAINST_OTHERS = "alpaca_eval"
"""Suite whose metrics come from the judgements of other models."""


def score_texts(run: Run, actor: Any, kind: str, name: str, checkpoint: Artifact, data: Artifact) -> Scores:
    """Return the metrics of a checkpoint by the suites of ``eval``; delete the run's folder.

    ``actor`` is the evaluation actor, ``kind`` the kind of its engine, ``data`` the validation rows.
    """
    context, found = SuiteContext(run, data, EvaluatorHandle(kind, lambda: actor)), {}
    for suite_name in run.config.eval.chosen(run.config.data):
        suite = suite_of(suite_name)
        measured = suite.measure(context, name, checkpoint)
        others = []
        if suite.second_pass and suite_name == AGAINST_OTHERS:
            others = suite.second_pass(context, {name: checkpoint}, {name: measured})[name]
        prefix = "" if suite_name == "accuracy" else f"{suite_name}/"
        for metric in suite.metrics(run.config.eval, measured, others):
            entry = {"value": metric.value, "low": metric.low, "high": metric.high, "n": metric.n}
            found[f"{prefix}{metric.metric}"] = {key: value for key, value in entry.items() if value is not None}
    shutil.rmtree(run.root)
    return found


def score_log(out: Path, step: int) -> Scores:
    """Return the scores of a step that are in the step log: log-probabilities of the probe and the held-out pairs."""
    line = read_lines(out / STEP_LOG)[step]
    found: Scores = {key: {"value": line[f"probe/{key}"]} for key in FROM_LOG if key.startswith("delta")}
    for name, pairs in (("reward_accuracy", "probe"), ("held_out_reward_accuracy", "held_out")):
        if f"{pairs}/n" in line:
            found[name] = share(line[f"{pairs}/accuracy"], round(line[f"{pairs}/n"]))
    return found
