"""What Ray Train's processes are told. Its controller imports this module; only the workers import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_ray.config import Config
from spo_ray.run import Artifact
from spo_ray.train_config import CheckpointConfig

RESULT = "result.json"
"""A job's results; written last, so its presence means that the job is finished."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    config: Config
    model: str
    """Directory or hub id of the starting checkpoint."""
    rows: Artifact
    out: str
    """Directory for the checkpoint and the metrics."""
    key: str
    """What its checkpoints are known by."""
    method: str | None = None
    """A name in ``config.methods``; None: SFT."""
    held_out: Artifact | None = None
    score_at: tuple[int, ...] = ()
    """Steps at which it is scored; behind all but the last it waits for a decision, see :mod:`spo_ray.train.rungs`."""
    start_from: str | None = None
    """Folder with the training state of another job, to go on from."""
    keep_state: bool = False
    """Put the training state beside the checkpoints that are scored."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """When its state is kept; SFT has no scores that could tell which of its checkpoints is the best."""
        config = self.config.train.checkpoint
        return config if self.method else config.model_copy(update={"best": None})

    @property
    def finished(self) -> bool:
        """Whether its results are there."""
        return (Path(self.out) / RESULT).exists()


def train_loop(arguments: dict[str, Any]) -> None:
    """Ray Train's entry: the jobs, one after another, but for those that an earlier start has finished."""
    import ray.train

    from spo_ray.train.feed import Table, shared_table
    from spo_ray.train.rank import Rank
    from spo_ray.train.rungs import StoppedError
    from spo_ray.train.snapshots import Snapshots
    from spo_ray.train.worker import Held, check_room, run_job

    rank, held = Rank.current(), Held()
    table_of = Table.of if arguments["from_files"] else lambda artifact: shared_table(artifact.digest)
    for job in arguments["jobs"]:
        done = [job.finished]
        if not any(rank.gather(done)):
            check_room(job, rank, held.now())
            snapshots = Snapshots(job.key, job.checkpoint, rank, job.start_from, job.config.train.timeout_s)
            try:
                run_job(job, rank, snapshots, table_of)
            except StoppedError:
                snapshots.wait()
            ray.train.report({"job": job.key, "finished": True})
