"""Entry point of Ray Train's workers, and the controller's record of their failures."""

import json
import time
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from spo_ray.errors import TrainingError, UserError
from spo_ray.runtime.console import redact
from spo_ray.runtime.failure import cause_of
from spo_ray.train.spec import FAILURES, RESULT

FATAL = (TrainingError, UserError, TypeError, ValueError, KeyError, AttributeError, IndexError, ImportError)


class RecordFailures(UserCallback):
    """Write failures down where the driver and the report find them; end the run on an error of the program's own."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = folders

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """See :class:`ray.train.UserCallback`; runs in Ray Train's controller."""
        causes = {rank: cause_of(error) for rank, error in worker_exceptions.items()}
        fatal = next((cause for cause in causes.values() if isinstance(cause, FATAL)), None)
        record = {
            "time": time.time(),
            "errors": {rank: redact(f"{type(cause).__name__}: {str(cause)[:500]}") for rank, cause in causes.items()},
            "restart": fatal is None,
        }
        for folder in map(Path, self.folders):
            if not (folder / RESULT).exists():  # the job that was under way
                with (folder / FAILURES).open("a") as file:
                    file.write(json.dumps(record) + "\n")
                break
        if fatal is not None:
            raise fatal


def train_loop(arguments: dict[str, Any]) -> None:
    """Ray Train's entry: the jobs, one after another, but for those that an earlier start has finished."""
    import ray.train

    from spo_ray.train.checkpointer import Checkpointer
    from spo_ray.train.data_loader import RowTable, shared_table
    from spo_ray.train.distributed import Distributed
    from spo_ray.train.score_gate import StoppedError
    from spo_ray.train.worker import RetainedMemory, check_room, run_job

    rank, held = Distributed.current(), RetainedMemory()
    table_of = RowTable.of if arguments["from_files"] else lambda artifact: shared_table(artifact.digest)
    for job in arguments["jobs"]:
        done = [job.finished]
        if not any(rank.gather(done)):
            check_room(job, rank, held.now())
            snapshots = Checkpointer(job.key, job.checkpoint, rank, job.config.train.timeout_s)
            try:
                run_job(job, rank, snapshots, table_of)
            except StoppedError:
                snapshots.wait()
            ray.train.report({"job": job.key, "finished": True})
