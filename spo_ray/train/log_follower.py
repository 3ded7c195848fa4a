"""Progress of trainings in the driver, read from the growing log files: this costs the workers nothing."""

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_ray.runtime.artifact import STEP_LOG
from spo_ray.runtime.console import Update, progress, warn
from spo_ray.runtime.heartbeat import STILL_S
from spo_ray.runtime.tracking import TrackerGroup, Trackers
from spo_ray.train.alarm import describe
from spo_ray.train.method_state import lower_level_notices
from spo_ray.train.spec import CONTROLLER, FAILURES, TrainJob

POLL_S = 1.0
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
        self.tracker: TrackerGroup | None = None
        self.last = -1
        self.moved, self.slowest = time.monotonic(), 0.0
        """When the last step came, and the longest time between two."""
        self.still = False
        self.noticed: set[str] = set()

    def look(self, update: Update) -> None:
        """Report what was added to the files."""
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
            for text in describe(record, self.job.config.preference.alarm):
                warn(self.name, text)
            for kind, text in lower_level_notices(record).items():
                if kind not in self.noticed:
                    self.noticed.add(kind)
                    warn(self.name, f"step {step}: {text}")
            if step:
                update(step, record["total_steps"], _step(record))

        if not self.still and time.monotonic() - self.moved > max(STILL_S, STILL_STEPS * self.slowest):
            self.still = True
            warn(self.name, f"no step for {time.monotonic() - self.moved:.0f} s")

    def _note_step(self, now: float) -> None:
        if self.last > 0 and not self.still:
            self.slowest = max(self.slowest, now - self.moved)
        self.moved, self.still = now, False

    def close(self) -> None:
        """Close the trackers."""
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


def _step(record: dict[str, Any]) -> str:
    logps = f", log pi(y_w) {record['logps/chosen']:.2f}" if record.get("logps/chosen") is not None else ""
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    return f"step {record['step']}/{record['total_steps']}, loss {loss}{logps}"


def _failure(record: dict[str, Any]) -> str:
    rank, text = next(iter(record["errors"].items()))
    text = text.splitlines()[0][:200]
    who = "the controller" if rank == CONTROLLER else f"worker {rank}"
    return f"{who} failed ({text}){': resuming from the newest checkpoint' if record['restart'] else ''}"
