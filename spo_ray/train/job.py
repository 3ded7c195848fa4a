"""What Ray Train's processes are told. Its controller imports this module; only the workers import torch."""

from dataclasses import dataclass
from typing import Any

from spo_ray.config import Config
from spo_ray.run import Artifact


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
    held_out: Artifact | None = None


def sft_loop(arguments: dict[str, Any]) -> None:
    """Ray Train's entry for SFT."""
    from spo_ray.train.worker import run_sft

    run_sft(arguments["job"])


def preference_loop(arguments: dict[str, Any]) -> None:
    """Ray Train's entry for a preference method."""
    from spo_ray.train.worker import run_preference

    run_preference(arguments["job"])
