"""Scores on the way: at some steps a training exports its state, and waits for the decision whether it goes on.

Trainer and decider meet in the job's folder: ``rungs/step_N`` is a checkpoint to score, ``rungs/step_N.json`` the
decision on it. Both stay readable after either side was killed.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from spo_ray.runtime.artifact import write_json

if TYPE_CHECKING:
    from spo_ray.train.distributed import Distributed


POLL_S = 0.1


class StoppedError(Exception):
    """The decision was to end the training here; not a failure."""


def rung_folder(out: str | Path, step: int) -> Path:
    """Where a job's checkpoint behind a step is put for scoring."""
    return Path(out) / "rungs" / f"step_{step:08d}"


def decide(out: str | Path, step: int, go_on: bool) -> None:
    """Let the training behind a step go on, or end it."""
    file = rung_folder(out, step).with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"go_on": go_on})


def decision(out: str | Path, step: int) -> bool | None:
    """The decision, None as long as there is none."""
    file = rung_folder(out, step).with_suffix(".json")
    return json.loads(file.read_text())["go_on"] if file.exists() else None


def wait_for_decision(out: str, step: int, rank: "Distributed", export: Callable[[Path], None]) -> None:
    """Let ``export`` write a checkpoint behind a step, and wait for the decision; a collective of all ranks.

    Raises:
        StoppedError: the training ends here.
    """
    folder = rung_folder(out, step)
    if not rank.gather([folder.exists() or decision(out, step) is not None])[0]:  # else they started again
        scratch = folder.with_name(f".{folder.name}")
        export(scratch)
        if rank.index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            scratch.replace(folder)
    # All ranks ask together, so that none waits in a collective for as long as scoring takes.
    while (go_on := rank.gather([decision(out, step)])[0]) is None:
        time.sleep(POLL_S)
    if not go_on:
        raise StoppedError
