"""What the stages of a job would take: memory by the training's own plan, time from earlier runs, disk by arithmetic.

Time is that of the same stage in an earlier run in the same output folder, by its rows; without one it is arithmetic
alone (2 operations per parameter and token that is made or scored, 6 per one that is trained on, more for SPO as
measured in docs/performance.md) at the rate of this machine's matrix products: rough, and for the most rows
there can be.
"""

import json
import shutil
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from spo_ray.config.methods import MethodConfig, Spo
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.model.memory import Device, MemoryEstimate, estimate_memory
from spo_ray.pipeline.outline import Line
from spo_ray.runtime.artifact import MANIFEST

BYTES_PER_SAMPLED_TOKEN = 6
"""Text, ids and counts of samples in Parquet, compressed."""
BYTES_PER_SCORED_TOKEN = 3
EXPORTED, CHECKPOINTED = 4, 12
"""Bytes of a parameter in an exported model, and in a checkpoint with AdamW's states."""


@dataclass(frozen=True)
class Estimate:
    """What one stage takes; None where it can't be known."""

    memory: int | None = None
    """Bytes of a worker or an engine."""
    seconds: float | None = None
    measured: bool = False
    """``seconds`` is from an earlier run, not arithmetic."""
    disk: int = 0
    """Bytes that stay."""
    while_it_runs: int = 0
    """Bytes of checkpoints, which are deleted at the end."""


class Estimator:
    """Estimates for the stages of one configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        gpu = torch.cuda.is_available() if config.train.use_gpu is None else config.train.use_gpu
        self.device: Device = "cuda" if gpu else "cpu"

    @cached_property
    def model(self) -> Any:
        """The model's configuration; None where it can't be read, for instance without a network."""
        try:
            return AutoConfig.from_pretrained(self.config.model.path)
        except (OSError, ValueError):
            return None

    def of(self, line: Line) -> Estimate:
        """The estimate for a stage."""
        plan, seconds, tokens = self.plan(line.trains or "sft"), self.before(line), line.tokens or 0
        if not plan or not tokens:
            return Estimate(None, seconds, True)
        count, measured = plan.parameters["total"], seconds is not None
        if seconds is None:
            seconds = _operations(self.config, line) / products_per_second() * count
        if line.trains:
            checkpoint = self.config.train.checkpoint
            trained = plan.parameters["theta"] + plan.parameters["phi"]
            kept = (checkpoint.keep + 1) * CHECKPOINTED * trained if checkpoint.every else 0
            return Estimate(plan.total, seconds, measured, EXPORTED * count, kept)
        size = EXPORTED if self.config.engine.dtype == "float32" else 2
        memory = size * count + (int(self.config.engine.memory_gib * 2**30) if self.device == "cpu" else 0)
        each = BYTES_PER_SAMPLED_TOKEN if line.stage.endswith("_samples") else BYTES_PER_SCORED_TOKEN
        return Estimate(memory, seconds, measured, each * tokens)

    def plan(self, stage: str) -> MemoryEstimate | None:
        """The memory plan of ``sft`` or a method."""
        if self.model is None:
            return None
        method: MethodConfig | None = None if stage == "sft" else self.config.methods[stage]
        try:
            return estimate_memory(self.config, self.model, stage, method, self.device)
        except UserError:  # settings that don't fit the model: the run says so
            return None

    def before(self, line: Line) -> float | None:
        """Seconds, by the newest run in the output folder that has such a stage."""
        files = self.config.output.absolute().glob(f"*/{line.stage}/{MANIFEST}")
        for file in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
            manifest = json.loads(file.read_text())
            read = manifest["rows"]["read"]
            return manifest["wall_s"] * (line.rows / read if line.rows and read else 1.0)
        return None


def _operations(config: Config, line: Line) -> float:
    """Multiplications and additions, per parameter."""
    if line.trains is None:
        return 2.0 * (line.tokens or 0)
    method = None if line.trains == "sft" else config.methods[line.trains]
    factor = (2.5 if method.gamma else 1.5) if isinstance(method, Spo) else 1.0
    return 6.0 * factor * (line.tokens or 0)


@cache
def products_per_second() -> float:
    """Multiplications and additions a second in matrix products, here and now."""
    matrix = torch.ones(1024, 1024, device="cuda" if torch.cuda.is_available() else "cpu")
    best = 0.0
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(matrix, matrix)[0, 0].item()  # a GPU works in the background
        best = max(best, 2.0 * len(matrix) ** 3 / (time.perf_counter() - started))
    return best


def free_bytes(folder: Path) -> int:
    """Room where a folder is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
