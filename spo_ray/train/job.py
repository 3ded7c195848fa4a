"""What Ray Train's processes are told. Its controller imports this module; only the workers import torch."""

from dataclasses import dataclass
from typing import Any

from spo_ray.config import Config
from spo_ray.run import Artifact

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
    method: str | None = None
    """A name in ``config.methods``; None: SFT."""
    held_out: Artifact | None = None


def train_loop(arguments: dict[str, Any]) -> None:
    """Ray Train's entry: the jobs, one after another."""
    from spo_ray.train.worker import run_job

    for job in arguments["jobs"]:
        run_job(job)
