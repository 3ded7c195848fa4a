"""The optimisation loop that SFT and every preference method share."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_ray.core.gradients import norm
from spo_ray.core.losses import Metrics
from spo_ray.core.sharded import local
from spo_ray.errors import TrainingError
from spo_ray.model.optimizer import Group, learning_rates, make_optimizer
from spo_ray.runtime.artifact import STEP_LOG
from spo_ray.train.alarm import STOP
from spo_ray.train.checkpointer import Checkpointer, Progress
from spo_ray.train.distributed import Distributed
from spo_ray.train.spec import CHECKPOINT, TrainJob, failures_of, record_failure

GradientsOf = Callable[[int, Sequence[int]], tuple[Mapping[str, Tensor], Metrics]]
"""Computes gradients by parameter name, and metrics, for a step (from 1) and the row numbers of its global batch."""

MAX_SKIPPED = 5
"""Steps in a row without a finite gradient that are skipped; one more ends the training."""


class Callback:
    """Base class for training callbacks. Every method runs on all ranks; the defaults do nothing."""

    def on_step_end(self, record: Metrics, indices: Sequence[int]) -> Metrics:
        """Return metrics of the state after a step on these rows, to be logged with it. Step 0 is the start."""
        return {}

    def on_step_logged(self, step: int) -> None:
        """Called after a step is logged, and again on resuming from that step's checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the callback, as JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""


class StepLog:
    """Writer of ``log.jsonl``: a JSON line for each step, from step 0, the state before training. Rank 0 writes."""

    def __init__(self, path: Path, rank: Distributed) -> None:
        self.path = path if rank.index == 0 else None

    def start(self, step: int) -> None:
        """Keep the lines up to a step and delete the later ones; at step 0 delete all."""
        if self.path is not None:
            lines = self.path.read_text().splitlines(keepends=True) if step and self.path.exists() else []
            self.path.write_text("".join(lines[: step + 1]))

    def write(self, record: Metrics) -> None:
        """Append the record of a step; values that are not finite become null."""
        if self.path is not None:
            values = {key: value if math.isfinite(value) else None for key, value in record.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def optimise(
    job: TrainJob,
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Sequence[int]],
    gradients: GradientsOf,
    checkpointer: Checkpointer,
    callbacks: Sequence[Callback] = (),
) -> float:
    """Train over the global batches, resuming from the newest checkpoint if there is one.

    Returns the seconds of training over all starts. Collective: call on all ranks.

    Raises:
        TrainingError: more than ``MAX_SKIPPED`` steps in a row had no finite gradient, or a checkpoint failed.
        StoppedError: a callback ended the training.
    """
    started, log = time.time(), StepLog(Path(job.out) / STEP_LOG, checkpointer.rank)
    optimizer = make_optimizer(groups, job.config.train.optimizer)

    def measure_and_log(record: Metrics, indices: Sequence[int]) -> None:
        for callback in callbacks:
            record |= callback.on_step_end(record, indices)
        log.write(record)

    total, progress = len(batches), _restored(job, checkpointer, model, optimizer)
    log.start(progress.step if progress else 0)
    if progress:
        for callback, state in zip(callbacks, progress.remembered, strict=True):
            callback.load_state_dict(state)
        for callback in callbacks:  # the process may have been killed after the checkpoint and before this
            callback.on_step_logged(progress.step)
    else:
        progress = Progress()
        measure_and_log({"step": 0, "total_steps": total}, [])
    before = progress.wall_s
    for step, indices in enumerate([] if progress.ended else batches[progress.step :], start=progress.step + 1):
        rates = learning_rates(optimizer, groups, step - 1, total)
        with checkpointer.limited():
            grads, metrics = gradients(step, indices)
        progress.step, norms = step, clip(groups, grads)
        grad_norm = math.hypot(*norms.values())
        if math.isfinite(grad_norm):
            progress.in_a_row = 0
            take_step(optimizer, groups, grads)
        else:
            _skip(progress, indices, metrics)
        record: Metrics = {"step": step, "total_steps": total, "grad_norm": grad_norm}
        record |= _by_group("grad_norm", norms) | {"learning_rate": next(iter(rates.values()))}
        record |= _by_group("learning_rate", rates) | {"skipped_steps": progress.skipped, **metrics}
        measure_and_log(record, indices)
        progress.wall_s, progress.ended = before + time.time() - started, bool(record.get(STOP))
        progress.remembered = [callback.state_dict() for callback in callbacks]
        if checkpointer.due(step, total):
            checkpointer.save(model, optimizer, progress, record)
        for callback in callbacks:
            callback.on_step_logged(step)
        if progress.ended:
            break
    checkpointer.wait()
    return before + time.time() - started


def _restored(
    job: TrainJob, checkpointer: Checkpointer, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Load the newest checkpoint that is not damaged, and record those that are."""
    failed = [name for failure in failures_of(Path(job.out)) for name in failure["errors"]]
    damaged = {name.removeprefix(CHECKPOINT) for name in failed if name.startswith(CHECKPOINT)}

    def unread(name: str, reason: str) -> None:
        record_failure([job.out], {CHECKPOINT + name: reason}, restart=False)

    return checkpointer.restore(model, optimizer, damaged, unread)


def _by_group(name: str, values: Mapping[str, float]) -> Metrics:
    return {f"{name}/{group}": value for group, value in values.items()}


def clip(groups: Sequence[Group], grads: Mapping[str, Tensor]) -> dict[str, float]:
    """Scale each group's gradient in place to at most its ``max_grad_norm``; return the norms before."""
    norms = {}
    for group in groups:
        own = [grads[name] for name in group.parameters]
        norms[group.name] = size = norm(own)
        if size > group.config.max_grad_norm:
            torch._foreach_mul_([local(grad) for grad in own], group.config.max_grad_norm / size)
    return norms


def take_step(optimizer: torch.optim.Optimizer, groups: Sequence[Group], grads: Mapping[str, Tensor]) -> None:
    """Update the parameters with these gradients."""
    for group in groups:
        for name, parameter in group.parameters.items():
            parameter.grad = grads[name]
    optimizer.step()
    optimizer.zero_grad()


def _skip(progress: Progress, indices: Sequence[int], metrics: Metrics) -> None:
    """Count a step without a finite gradient; raise TrainingError after ``MAX_SKIPPED`` in a row."""
    progress.skipped, progress.in_a_row = progress.skipped + 1, progress.in_a_row + 1
    if progress.in_a_row > MAX_SKIPPED:
        shown = {key: value for key, value in metrics.items() if not math.isfinite(value)} or metrics
        raise TrainingError(
            f"step {progress.step}: the gradient is not finite, {progress.in_a_row} steps in a row (rows "
            f"{list(indices)[:8]}): {shown}. The parameters are as they were before these steps: lower "
            "the learning rate, or look at these rows"
        )
