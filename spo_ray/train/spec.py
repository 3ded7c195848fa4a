"""Descriptions of training jobs. Imports no torch, so that Ray Train's controller starts quickly."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spo_ray.config.schema import Config
from spo_ray.config.train import CheckpointConfig
from spo_ray.runtime.artifact import Artifact, read_lines

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
    """Steps at which it is scored; after all but the last it waits for a decision (:mod:`spo_ray.train.score_gate`)."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """When its state is kept; SFT has no scores that could tell which of its checkpoints is the best."""
        config = self.config.train.checkpoint
        return config if self.method else config.model_copy(update={"best": None})

    @property
    def finished(self) -> bool:
        """Whether its results are there."""
        return (Path(self.out) / RESULT).exists()


FAILURES = "failures.jsonl"
"""In a job's folder: one line for every time that its workers failed."""


def failures_of(folder: Path) -> list[dict[str, Any]]:
    """What was written down about a job."""
    return read_lines(folder / FAILURES)


@dataclass
class Prepared:
    """The artifacts of a job up to the start of preference training, set one after another."""

    config: Config
    test: Artifact = field(init=False)
    """Held-out questions, or for preference data pairs."""
    base: Artifact = field(init=False)
    chosen: Artifact = field(init=False)
    """Questions with responses, or pairs, that SFT is trained on."""
    sft: Artifact = field(init=False)
    pairs: Artifact = field(init=False)
    """Training pairs as text."""
    reference: Artifact = field(init=False)
    """Training pairs as token ids with reference log-probabilities."""
    held_out: Artifact | None = None
    """Held-out pairs with reference log-probabilities."""
    validation: Artifact | None = None
    """Rows that sweeps score trials on: questions, or for preference data pairs."""


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    model: Artifact
    rows: Artifact
