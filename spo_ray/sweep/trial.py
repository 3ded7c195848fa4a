"""One trial: a Ray Train run of its own, scored by evaluation actors on the way and at its end.

Everything that a trial knows is in its folder: ``trial.json`` what it is, ``scores.jsonl`` one line a score, and in
``training`` what :mod:`spo_ray.train` writes. A trial that starts again goes on from there, whoever was killed.
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

from spo_ray.config.sweep import SweepConfig, names_of
from spo_ray.errors import TrainingError, UserError
from spo_ray.evaluate.actors import EvaluatorHandle
from spo_ray.evaluate.evaluations import suite_of
from spo_ray.evaluate.statistics import share
from spo_ray.evaluate.suite import SuiteContext
from spo_ray.runtime.artifact import STEP_LOG, Artifact, read_lines, write_json
from spo_ray.runtime.console import install
from spo_ray.runtime.run import Run
from spo_ray.sweep.space import Point, run_for, shared_values, sweep_of, trial_config
from spo_ray.train.score_gate import decide, decision, rung_folder
from spo_ray.train.spec import Prepared, TrainJob

TRIAL, SCORES, FAILED, TRAINING = "trial.json", "scores.jsonl", "failed.json", "training"
Record = dict[str, Any]
"""Scores behind a step by their names, each with ``value``, and ``low`` and ``high`` where it has an interval."""
PROGRESS = "progress"
"""Percent of the steps, what schedulers call time."""
POLL_S = 0.1
STOP_S = 60
"""How long a training that is told to stop may take, before its processes are ended with the trial's."""


@dataclass(frozen=True)
class Context:
    """What all trials are given."""

    run: Run
    prepare: Callable[[Run], Prepared]
    """Makes a trial's start where it is not known yet."""
    folder: Path
    """Of all trials."""
    digest: str
    """Of all that they have in common."""
    known: dict[str, Prepared]
    """Starts by their shared values, as JSON."""
    evaluators: list[Any]
    engine: str
    """Kind of the evaluators' engines."""


def trial(config: dict[str, Any], context: Context) -> None:
    """Ray Tune's entry."""
    # A stopped trial ends its training before the process is used again; Ray Tune reads this here.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(STOP_S)
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one process less; nothing here listens to it
    install()
    Trial(config["point"], context, folder_name(config, str(tune.get_context().get_trial_id()))).run()


def folder_name(config: Mapping[str, Any], trial_id: str) -> str:
    """A trial's folder: its number in the list of all, or Ray Tune's id where there is none."""
    number = config["point"]["number"]
    return trial_id if number is None else f"{number:05d}"


class Trial:
    """One trial at work."""

    def __init__(self, point: Point, context: Context, name: str) -> None:
        self.point, self.context, self.name = point, context, name
        self.sweep = sweep_of(context.run.config)
        self.folder = context.folder / name
        self.out = self.folder / TRAINING
        self.started = time.time()
        self.before = 0.0
        """Seconds of earlier starts."""
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train, score and report, until the end or until the scheduler stops it."""
        failed = self.folder / FAILED
        if failed.exists():  # it would again
            raise RuntimeError(json.loads(failed.read_text())["error"])
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / TRIAL, {**self.point, "trial_id": tune.get_context().get_trial_id()})
        try:
            self._run()
        except TrainingError as error:
            write_json(failed, {"error": f"{type(error).__name__}: {error}"})
            raise

    def _run(self) -> None:
        shared = self._shared()
        config = trial_config(shared.config, self.point["values"], self.point["seed"])
        settings = config.preference
        total = settings.epochs * -(-shared.reference.count // settings.batch_size)
        shares = steps_of(self.sweep, total)
        self._forget_undecided()
        earlier = scores(self.folder)
        self.before = earlier[-1]["seconds"] if earlier else 0.0
        job = TrainJob(
            config=config,
            model=str(shared.sft.path),
            rows=shared.reference,
            out=str(self.out),
            key=f"trial_{self.name}_{self.context.digest[:12]}",
            method=self.sweep.method,
            held_out=shared.held_out,
            score_at=tuple(shares),
        )
        training = threading.Thread(target=self._train, args=(job,), daemon=True)
        training.start()
        try:
            for step, share in shares.items():
                if self._pass(share, step, job, training):
                    break
        finally:
            for step in list(shares)[:-1]:
                if decision(self.out, step) is None:
                    decide(self.out, step, go_on=False)
            training.join(STOP_S)

    def _shared(self) -> Prepared:
        key = key_of(self.point["values"])
        if key not in self.context.known:
            run = run_for(self.context.run, self.point["values"])
            with run.locked(wait=True):
                self.context.known[key] = self.context.prepare(run)
        return self.context.known[key]

    def _forget_undecided(self) -> None:
        """Delete an earlier start's exported checkpoints, and its decisions that were to stop or have no score."""
        scored = {record["step"] for record in scores(self.folder)}
        for exported in (path for path in (self.out / "rungs").glob("*") if path.is_dir()):
            shutil.rmtree(exported)  # the log that belongs to it is about to be written anew
        for file in (self.out / "rungs").glob("step_*.json"):
            step = int(file.stem.removeprefix("step_"))
            if step not in scored or not decision(self.out, step):
                file.unlink()

    def _train(self, job: TrainJob) -> None:
        from spo_ray.train.launch import fit, group_name

        try:
            run = self.context.run.at(self.context.run.root, job.config)
            # named after all that it depends on: another training must not go on from its checkpoints
            identity = json.dumps([self.context.digest, self.name, self.point], sort_keys=True)
            if not job.finished:
                fit(run, [job], [f"trial {self.name}"], group_name(identity), from_files=True)
        except BaseException as error:
            self.error = error

    def _pass(self, share: float, step: int, job: TrainJob, training: threading.Thread) -> bool:
        """Wait for a checkpoint, score it, report, and let the training go on; tells if a rule stops it instead."""
        record = next((known for known in scores(self.folder) if known["step"] == step), None)
        last = share == 1.0
        folder = self.out if last else rung_folder(self.out, step)
        if record is None:
            while training.is_alive() if last else not folder.exists():
                if self.error or not training.is_alive():
                    break
                time.sleep(POLL_S)
            self._check(job, folder)
            record = self._score(share, step, folder)
        elif last:
            training.join()
        stop = bool(record["stopped"])
        if stop:
            decide(self.out, step, go_on=False)
            training.join(STOP_S)
        tune.report({**values_of(record), PROGRESS: percent(share), "step": step, "done": last or stop})
        shutil.rmtree(rung_folder(self.out, step), ignore_errors=True)
        if not stop:
            decide(self.out, step, go_on=True)
        return stop

    def _check(self, job: TrainJob, folder: Path) -> None:
        if self.error:
            raise self.error
        if not (job.finished if folder == self.out else folder.exists()):
            raise RuntimeError(f"the training of trial {self.name} ended without a checkpoint to score")

    def _score(self, share: float, step: int, folder: Path) -> Record:
        shared, context = self._shared(), self.context
        record: Record = score_log(self.out, step)
        actor = context.evaluators[(self.point["number"] or 0) % len(context.evaluators)]
        checkpoint = Artifact(folder, f"{context.digest}/{self.name}/{step}")
        scratch = context.folder / f".scored_{self.name}_{step}"
        assert shared.validation is not None  # SweepConfig sees to that
        run = context.run.at(scratch, shared.config)
        record = score_texts(run, actor, context.engine, self.name, checkpoint, shared.validation) | record
        missing = [name for name in names_of(self.sweep) if name not in record]
        if missing:
            raise UserError(f"sweep.objectives: there is no score {missing[0]}; there are {', '.join(sorted(record))}")
        seconds = self.before + time.time() - self.started
        record |= {"step": step, "share": share, "seconds": round(seconds, 1), "values": self.point["values"]}
        record["stopped"] = None if share == 1.0 else self._stop_reason(record)
        _write_scores(self.folder, [*scores(self.folder), record])
        return record

    def _stop_reason(self, record: Mapping[str, Any]) -> str | None:
        fall, limit = -record["delta_logp_chosen"]["value"], self.sweep.max_fall
        if limit is None or fall <= limit:
            return None
        return f"collapse: log pi(y_w) fell by {fall:.2f} nats, more than sweep.max_fall={limit:g}"


def steps_of(sweep: SweepConfig, total: int) -> dict[int, float]:
    """Steps at which a trial is scored with their shares: the last one's where several fall on one step."""
    return {max(1, round(share * total)): share for share in sweep.score_at}


def percent(share: float) -> float:
    """A share of the steps as schedulers are told it."""
    return round(100 * share, 6)


def key_of(values: Mapping[str, Any]) -> str:
    """What tells apart the starts of trials with these values."""
    return json.dumps(shared_values(values), sort_keys=True)


def scores(folder: Path) -> list[Record]:
    """A trial's scores so far."""
    return read_lines(folder / SCORES)


def _write_scores(folder: Path, records: list[Record]) -> None:
    temporary = folder / f".{SCORES}"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    temporary.replace(folder / SCORES)


AGAINST_OTHERS = "alpaca_eval"
"""The suite that gets its figures from other models' judgements."""


def score_texts(run: Run, actor: Any, kind: str, name: str, checkpoint: Artifact, data: Artifact) -> Record:
    """Return what the suites of ``eval`` measure of a checkpoint by one evaluation actor; delete the run's folder."""
    context, record = SuiteContext(run, data, EvaluatorHandle(kind, lambda: actor)), {}
    for suite_name in run.config.eval.chosen(run.config.data):
        suite = suite_of(suite_name)
        found = suite.measure(context, name, checkpoint)
        others = []
        if suite.second_pass and suite_name == AGAINST_OTHERS:
            others = suite.second_pass(context, {name: checkpoint}, {name: found})[name]
        prefix = "" if suite_name == "accuracy" else f"{suite_name}/"
        for m in suite.metrics(run.config.eval, found, others):
            entry = {"value": m.value, "low": m.low, "high": m.high, "n": m.n}
            record[f"{prefix}{m.metric}"] = {key: value for key, value in entry.items() if value is not None}
    shutil.rmtree(run.root)
    return record


def score_log(out: Path, step: int) -> Record:
    """Log-probability measures behind a step, from the step log: of the probe pairs, and of the held-out ones."""
    line = read_lines(out / STEP_LOG)[step]
    found: Record = {key: {"value": line[f"probe/{key}"]} for key in ("delta_logp_chosen", "delta_logp_rejected")}
    for name, pairs in (("reward_accuracy", "probe"), ("held_out_reward_accuracy", "held_out")):
        if f"{pairs}/n" in line:
            found[name] = share(line[f"{pairs}/accuracy"], round(line[f"{pairs}/n"]))
    return found


def values_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The scores alone, for schedulers and searchers."""
    return {key: entry["value"] for key, entry in record.items() if isinstance(entry, dict) and "value" in entry}
