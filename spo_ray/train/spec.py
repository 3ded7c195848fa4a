"""Descriptions of training jobs. Imports no torch, so that Ray Train's controller starts quickly."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spo_ray.config.methods import MethodConfig
from spo_ray.config.schema import Config
from spo_ray.config.train import CheckpointConfig
from spo_ray.runtime.artifact import Artifact, read_lines
from spo_ray.runtime.console import redact

RESULT = "result.json"
"""File with a job's results, in its folder. It is written last: where it exists, the job is finished."""
CHANGES = "pairs.parquet"
"""File in a method's folder with the change of each training pair's log-probabilities."""
FAILURES = "failures.jsonl"
"""File in a job's folder with one line for each failure of its workers."""

CONTROLLER = "controller"
"""Name of Ray Train's own process in that file, instead of a rank."""
CHECKPOINT = "checkpoint "
"""Beginning of the names of damaged checkpoints in that file, instead of a rank."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training of one model: SFT, or one preference method."""

    config: Config
    model: str
    """Folder or hub id of the checkpoint that training starts from."""
    rows: Artifact
    """SFT rows, or pairs with reference logps."""
    out: str
    """Folder for the exported checkpoint, the step log and the result."""
    key: str
    """Unique name of the job: checkpoints within training and trackers' runs are stored under it."""
    method: str | None = None
    """Name of the preference method in ``config.methods``; None for SFT."""
    held_out: Artifact | None = None
    """Pairs that are measured and not trained on; None: no such measurement."""
    score_at: tuple[int, ...] = ()
    """Steps at which a checkpoint is scored (:mod:`spo_ray.train.score_gate`); after the last one training ends."""

    @property
    def method_config(self) -> MethodConfig | None:
        """Configuration of the preference method; None for SFT."""
        return None if self.method is None else self.config.methods[self.method]

    @property
    def checkpoint(self) -> CheckpointConfig:
        """Settings of checkpoints within training. SFT has no metric by which its best checkpoint could be chosen."""
        config = self.config.train.checkpoint
        return config if self.method else config.model_copy(update={"best": None})

    @property
    def finished(self) -> bool:
        """True if the job's results are written."""
        return (Path(self.out) / RESULT).exists()


@dataclass
class Prepared:
    """Artifacts of a run up to the start of preference training; the stages set them one after another."""

    config: Config
    test: Artifact = field(init=False)
    """Held-out questions; for preference data, held-out pairs."""
    base: Artifact = field(init=False)
    """Base model."""
    chosen: Artifact = field(init=False)
    """Questions with responses, or pairs; SFT is trained on them."""
    policy: Artifact = field(init=False)
    """Reference model, from which every method starts: the SFT checkpoint, or the base model without SFT."""
    pairs: Artifact = field(init=False)
    """Training pairs as text."""
    reference: Artifact = field(init=False)
    """Training pairs as token ids, with reference logps."""
    held_out: Artifact | None = None
    """Held-out pairs as token ids, with reference logps; None: no held-out pairs."""
    validation: Artifact | None = None
    """Rows that a sweep scores its trials on: questions, or pairs for preference data; None outside of sweeps."""

    @property
    def untrained(self) -> dict[str, Artifact]:
        """Checkpoints before preference training, by their names in the evaluation."""
        return ({"base": self.base} if self.config.sft else {}) | {self.config.reference: self.policy}


@dataclass(frozen=True)
class Start:
    """Checkpoint and rows that a training starts from."""

    model: Artifact
    rows: Artifact


def failures_of(folder: Path) -> list[dict[str, Any]]:
    """Return the recorded failures of a job's workers."""
    return read_lines(folder / FAILURES)


def record_failure(folders: Sequence[str], errors: Mapping[Any, str], *, restart: bool) -> None:
    """Append a failure to the file of the job that was running, the first in ``folders`` that is not finished.

    ``errors`` are by rank, or by the name of what failed instead of a worker, such as :data:`CONTROLLER`.
    """
    texts = {failed: redact(text[:500]) for failed, text in errors.items()}
    record = {"time": time.time(), "errors": texts, "restart": restart}
    for folder in map(Path, folders):
        if not (folder / RESULT).exists():
            with (folder / FAILURES).open("a") as file:
                file.write(json.dumps(record) + "\n")
            break


def text_of(error: BaseException) -> str:
    """Return an error's class and message, as they are recorded."""
    return f"{type(error).__name__}: {error}"
