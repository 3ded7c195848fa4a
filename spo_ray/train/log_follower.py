"""Progress of trainings in the driver, read from the growing log files: this costs the workers nothing."""

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_ray.runtime.artifact import STEP_LOG
from spo_ray.runtime.console import Update, log, progress, warn
from spo_ray.runtime.heartbeat import STILL_S
from spo_ray.runtime.run import TOLD, State
from spo_ray.runtime.tracking import TrackerGroup, Trackers
from spo_ray.train.alarm import STOP, describe
from spo_ray.train.method_state import lower_level_notices
from spo_ray.train.spec import FAILURES, RESULT, TrainJob

POLL_S = 1.0
NOTICED = 10
"""Steps with the same notice until it is told: a single batch may be unusual."""
SHOWN = {
    "logps/chosen_change": "chosen {:+.2f}",
    "logps/rejected_change": "rejected {:+.2f}",
    "rewards/margins": "margin {:+.2f}",
    "rewards/accuracies": "accuracy {:.0%}",
    "learning_rate": "lr {:.1e}",
}
"""Metrics of a step's line, with their texts."""
PAGE = "docs/failures.md"
"""Page about the displacement alarm."""
STILL_STEPS = 5
"""Times the slowest step, if that is more than :data:`~spo_ray.runtime.heartbeat.STILL_S`, until a step is missed."""


class Tail:
    """Reader of a growing file of JSON lines. If the file is cut, the lines added after the cut are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen = 0

    def new(self) -> list[Any]:
        """Return the complete lines added since the last call."""
        text = self.path.read_text() if self.path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        fresh, self.seen = lines[min(self.seen, len(lines)) :], len(lines)
        return [json.loads(line) for line in fresh]


class JobView:
    """Reports one job's progress, failures and alarms to the console, and its metrics to the trackers."""

    def __init__(self, job: TrainJob, name: str, trackers: Trackers) -> None:
        self.job, self.name, self.trackers = job, name, trackers
        self.steps, self.failures = Tail(Path(job.out) / STEP_LOG), Tail(Path(job.out) / FAILURES)
        self.failures.new()  # failures of an earlier start were reported then
        self.state: State = "resume" if self.steps.path.exists() else "build"
        self.tracker: TrackerGroup | None = None
        self.last, self.clipped = -1, 0
        self.since: tuple[int, float] | None = None
        """Step and time of the first look, from which the speed is counted."""
        config, sft = job.config.preference, job.config.sft
        groups = {"theta": config.theta, "phi": config.phi} if job.method or sft is None else {"theta": sft}
        self.limits = {f"grad_norm/{name}": group.max_grad_norm for name, group in groups.items()}
        self.moved, self.slowest = 0.0, 0.0
        """When the last step came or, before one, the first look; and the longest time between two steps."""
        self.still = False
        self.noticed = Counter[str]()

    def look(self, update: Update) -> None:
        """Report what was added to the files."""
        self.moved = self.moved or time.monotonic()
        for record in self.failures.new():
            warn(self.name, _failure(record))
        for record in self.steps.new():
            step = record["step"]
            if step <= self.last:  # repeated after a restart, with the same result
                continue
            self.last = step
            self._note_step(time.monotonic())
            if self.tracker is None:
                self.tracker = self.trackers.open(self.name, self.job.key, step)
            self.tracker.log(step, {key: value for key, value in record.items() if value is not None})
            for text, advice in describe(record, self.job.config.preference.alarm):
                warn(self.name, f"ALARM at step {step}: {text}.")
                warn(self.name, f"{advice[:1].upper()}{advice[1:]}. See {PAGE}.")
            if record.get(STOP):
                warn(self.name, f"Training ends at step {step}, because on_alarm is stop.")
            for kind, text in lower_level_notices(record).items():
                self.noticed[kind] += 1
                if self.noticed[kind] == min(NOTICED, record["total_steps"]):
                    warn(self.name, f"step {step}: {text}")
            self.clipped += any((record.get(key) or 0.0) > limit for key, limit in self.limits.items())
            if step:
                text = self._text(record)
                update(step, record["total_steps"], text)
                if step == record["total_steps"]:
                    log(self.name, text)
        if self.since is None and self.last >= 0:
            self.since = self.last, time.monotonic()
        if not self.still and time.monotonic() - self.moved > max(STILL_S, STILL_STEPS * self.slowest):
            self.still = True
            warn(self.name, f"no step for {time.monotonic() - self.moved:.0f} s")

    def _text(self, record: dict[str, Any]) -> str:
        """Return a step's line: loss, changes since the reference, speed, and the share of clipped steps so far."""
        step, total = record["step"], record["total_steps"]
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        told = [form.format(record[key]) for key, form in SHOWN.items() if record.get(key) is not None]
        if self.since and step > self.since[0]:
            told.append(f"{(time.monotonic() - self.since[1]) / (step - self.since[0]):.2g} s/step")
        return ", ".join([f"step {step}/{total}", f"loss {loss}", *told, f"{self.clipped / step:.0%} clipped"])

    def _note_step(self, now: float) -> None:
        if self.last > 0 and not self.still:
            self.slowest = max(self.slowest, now - self.moved)
        self.moved, self.still = now, False

    def close(self) -> None:
        """Close the trackers, and log how long a finished training's steps took."""
        if self.job.finished:
            result = json.loads((Path(self.job.out) / RESULT).read_text())
            log(self.name, f"done; its steps took {result['wall_s']:.1f} s")
        if self.tracker is not None:
            self.tracker.close()


class Follower:
    """Context manager with a thread that reports the progress of jobs, one after another."""

    def __init__(self, jobs: Sequence[TrainJob], names: Sequence[str], trackers: Trackers) -> None:
        self.views = [JobView(job, name, trackers) for job, name in zip(jobs, names, strict=True)]
        self.finished = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def _follow(self) -> None:
        for view in self.views:
            if self.finished.is_set() and not view.job.finished:  # an earlier one failed, so this one never started
                break
            log(view.name, TOLD[view.state])
            with progress(view.name) as update:
                while not (view.job.finished or self.finished.wait(POLL_S)):
                    view.look(update)
                view.look(update)
            view.close()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.finished.set()
        self.thread.join()


def _failure(record: dict[str, Any]) -> str:
    rank, text = next(iter(record["errors"].items()))
    text = text.splitlines()[0][:200]
    who = f"worker {rank}" if rank.isdigit() else f"the {rank}"
    return f"{who} failed ({text}){': resuming from the newest checkpoint' if record['restart'] else ''}"
