"""Entry point of Ray Train's workers, and the callback in its controller: failures, and the list of checkpoints."""

import json
from pathlib import PurePosixPath
from typing import Any, cast

from pyarrow.fs import FileSystem, FileType
from ray.train import Checkpoint, UserCallback
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME as CHECKPOINTS

from spo_ray.errors import TrainingError, UserError
from spo_ray.runtime.failure import cause_of
from spo_ray.runtime.heartbeat import Heartbeat
from spo_ray.train.spec import record_failure, text_of

FATAL = (TrainingError, UserError, TypeError, ValueError, KeyError, AttributeError, IndexError, ImportError)
"""Errors that would occur again after a restart."""


KEPT = f"{CHECKPOINTS}.kept"
"""Copy of Ray Train's list of checkpoints, which it writes in place: a kill at that moment leaves a part of it."""


class ControllerCallback(UserCallback):
    """Record failures in the job's folder, for the driver and the report; end the run if a restart would not help.

    After each checkpoint it copies the list of checkpoints, for :func:`mend_checkpoints`.
    """

    def __init__(self, folders: list[str]) -> None:
        self.folders = folders

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Called in Ray Train's controller after it has registered a report; see :class:`ray.train.UserCallback`."""
        if checkpoint is not None:
            folder, filesystem = PurePosixPath(checkpoint.path).parent, cast("FileSystem", checkpoint.filesystem)
            filesystem.copy_file(f"{folder}/{CHECKPOINTS}", f"{folder}/{KEPT}.new")
            filesystem.move(f"{folder}/{KEPT}.new", f"{folder}/{KEPT}")

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Called in Ray Train's controller after workers failed; see :class:`ray.train.UserCallback`."""
        causes = {rank: cause_of(error) for rank, error in worker_exceptions.items()}
        fatal = next((cause for cause in causes.values() if isinstance(cause, FATAL)), None)
        record_failure(self.folders, {rank: text_of(cause) for rank, cause in causes.items()}, restart=fatal is None)
        if fatal is not None:
            raise fatal


def mend_checkpoints(filesystem: FileSystem, folder: str) -> str:
    """Replace Ray Train's list of checkpoints in a group's folder by its copy if it can't be read.

    Without this Ray Train's controller could not start again. Returns what was done; empty if nothing had to be.
    """
    listed, kept = f"{folder}/{CHECKPOINTS}", f"{folder}/{KEPT}"
    there = [info.path for info in filesystem.get_file_info([listed, kept]) if info.type == FileType.File]
    if listed not in there:
        return ""
    try:
        with filesystem.open_input_stream(listed) as stream:
            json.loads(stream.read())
    except ValueError:
        if kept in there:
            filesystem.copy_file(kept, listed)
            return f"{listed} can't be read: its copy is used"
        filesystem.delete_file(listed)
        return f"{listed} can't be read: training begins at step 0"
    return ""


def train_loop(arguments: dict[str, Any]) -> None:
    """Entry of Ray Train's workers: run the jobs one after another, except those finished by an earlier start."""
    import ray.train

    from spo_ray.train.checkpointer import Checkpointer
    from spo_ray.train.data_loader import RowTable, shared_table
    from spo_ray.train.distributed import Distributed
    from spo_ray.train.memory_check import RetainedMemory, check_room
    from spo_ray.train.score_gate import StoppedError
    from spo_ray.train.worker import run_job

    rank, retained = Distributed.current(), RetainedMemory()
    limit = arguments["jobs"][0].config.train.timeout_s
    heartbeat = Heartbeat(arguments["beats"], f"training worker {rank.index}", limit)
    table_of = RowTable.of if arguments["from_files"] else lambda artifact: shared_table(artifact.digest)
    for job in arguments["jobs"]:
        if any(rank.gather([job.finished])):
            continue
        check_room(job, rank, retained.now())
        checkpointer = Checkpointer(job.key, job.checkpoint, rank, limit, heartbeat.call)
        try:
            run_job(job, rank, checkpointer, table_of)
        except StoppedError:
            checkpointer.wait()
        ray.train.report({"job": job.key, "finished": True})
    heartbeat.end()
