"""Entry point of Ray Train's workers, and the callback that records their failures in the controller."""

from typing import Any

from ray.train import UserCallback

from spo_ray.errors import TrainingError, UserError
from spo_ray.runtime.failure import cause_of
from spo_ray.runtime.heartbeat import Heartbeat
from spo_ray.train.spec import record_failure, text_of

FATAL = (TrainingError, UserError, TypeError, ValueError, KeyError, AttributeError, IndexError, ImportError)
"""Errors that would occur again after a restart."""


class RecordFailures(UserCallback):
    """Record failures in the job's folder, for the driver and the report; end the run if a restart would not help."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = folders

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Called in Ray Train's controller after workers failed; see :class:`ray.train.UserCallback`."""
        causes = {rank: cause_of(error) for rank, error in worker_exceptions.items()}
        fatal = next((cause for cause in causes.values() if isinstance(cause, FATAL)), None)
        record_failure(self.folders, {rank: text_of(cause) for rank, cause in causes.items()}, restart=fatal is None)
        if fatal is not None:
            raise fatal


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
