"""Score gates for sweeps: at given steps a training exports a checkpoint and waits until it may continue.

Training and sweep communicate through files in the job's folder, which survive if either process is killed:
``rungs/step_N`` is a checkpoint to score, ``rungs/step_N.json`` the decision on it.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from spo_ray.runtime.artifact import write_json
from spo_ray.train.distributed import Distributed
from spo_ray.train.loop import Callback
from spo_ray.train.spec import TrainJob

POLL_S = 0.1


class StoppedError(Exception):
    """Raised in training when the decision is to end it; not a failure."""


class ScoreGate(Callback):
    """Export a checkpoint at every step of ``job.score_at`` but the last, and wait for the decision on it."""

    def __init__(self, job: TrainJob, rank: Distributed, export: Callable[[Path], None]) -> None:
        self.job, self.rank, self.export = job, rank, export

    def on_step_logged(self, step: int) -> None:
        """Wait for a decision; raises StoppedError if it ends the training."""
        if step in self.job.score_at[:-1]:
            wait_for_decision(self.job.out, step, self.rank, self.export)


def rung_folder(out: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint to score after a step."""
    return Path(out) / "rungs" / f"step_{step:08d}"


def decide(out: str | Path, step: int, go_on: bool) -> None:
    """Let the training continue after a step, or end it."""
    file = rung_folder(out, step).with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"go_on": go_on})


def decision(out: str | Path, step: int) -> bool | None:
    """Return True to continue after a step, False to end, None if there is no decision yet."""
    file = rung_folder(out, step).with_suffix(".json")
    return json.loads(file.read_text())["go_on"] if file.exists() else None


def wait_for_decision(out: str, step: int, rank: Distributed, export: Callable[[Path], None]) -> None:
    """Write a checkpoint with ``export`` and wait for the decision on it. Collective: call on all ranks.

    After a restart a checkpoint that is there already, or has its decision, is not exported again.

    Raises:
        StoppedError: the decision is to end the training.
    """
    folder = rung_folder(out, step)
    if not rank.gather([folder.exists() or decision(out, step) is not None])[0]:
        scratch = folder.with_name(f".{folder.name}")
        export(scratch)
        if rank.index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            scratch.replace(folder)
    # all ranks poll together: a rank that waited in one collective while scoring takes long would time out
    while (go_on := rank.gather([decision(out, step)])[0]) is None:
        time.sleep(POLL_S)
    if not go_on:
        raise StoppedError
