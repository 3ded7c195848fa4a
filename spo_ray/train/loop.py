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
from spo_ray.train.checkpointer import Checkpointer, Extra
from spo_ray.train.distributed import Distributed
from spo_ray.train.spec import Job

GradientsOf = Callable[[int, Sequence[int]], tuple[Mapping[str, Tensor], Metrics]]
"""Gradients by parameter name and metrics of a step (from 1) on a global batch of row numbers."""

MAX_SKIPPED = 5
"""Steps in a row without a finite gradient that are skipped. More are no accident, and end the training."""


class Callback:
    """What hangs on the training loop. Every method is a collective of all ranks; here they do nothing."""

    def on_step_end(self, record: Metrics, indices: Sequence[int]) -> Metrics:
        """Metrics about the state after a step on these rows, to be recorded with it; step 0 is the start."""
        return {}

    def on_step_logged(self, step: int) -> None:
        """When a step is recorded; once more where it goes on from the job's checkpoint of that step."""

    def state_dict(self) -> dict[str, Any]:
        """What the callback remembers between steps, for checkpoints; all callbacks' keys differ."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what all callbacks remembered."""


class StepLog:
    """``log.jsonl``: one JSON line a step, and one for the state before step 0. Rank 0 writes it."""

    def __init__(self, path: Path, rank: Distributed) -> None:
        self.path = path if rank.index == 0 else None

    def start(self, step: int) -> None:
        """Keep what was written up to a step, and nothing after it; with step 0: nothing at all."""
        if self.path is not None:
            lines = self.path.read_text().splitlines(keepends=True) if step and self.path.exists() else []
            self.path.write_text("".join(lines[: step + 1]))

    def write(self, record: Metrics) -> None:
        """Add a step; what is no finite number becomes null."""
        if self.path is not None:
            values = {key: value if math.isfinite(value) else None for key, value in record.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def optimise(
    job: Job,
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Sequence[int]],
    gradients: GradientsOf,
    rank: Distributed,
    snapshots: Checkpointer,
    callbacks: Sequence[Callback] = (),
) -> float:
    """AdamW over the global batches, from the newest checkpoint on if there is one; gives the seconds it took in all.

    Raises:
        TrainingError: more steps in a row than configured without a finite gradient, or a checkpoint can't be written.
        StoppedError: a callback says that the training ends here.
    """
    started, config, log = time.time(), job.config.train, StepLog(Path(job.out) / STEP_LOG, rank)
    optimizer = make_optimizer(groups, config.optimizer)
    extra = snapshots.restore(model, optimizer)
    first, total = extra.get("step", 0) + 1, len(batches)
    skipped, in_a_row, before = extra.get("skipped", 0), extra.get("in_a_row", 0), extra.get("wall_s", 0.0)
    log.start(first - 1)

    def watched(record: Metrics, indices: Sequence[int]) -> Metrics:
        for callback in callbacks:
            record |= callback.on_step_end(record, indices)
        return record

    if extra:
        _recall(callbacks, extra)
    else:
        log.write(watched({"step": 0, "total_steps": total}, []))
    for step, indices in enumerate(batches[total if extra.get("ended") else first - 1 :], start=first):
        rates = learning_rates(optimizer, groups, step - 1, total)
        grads, metrics = gradients(step, indices)
        norms = clip(groups, grads)
        whole = math.hypot(*norms.values())
        in_a_row = 0 if math.isfinite(whole) else in_a_row + 1
        if in_a_row:
            skipped += 1
            _check_skipped(step, indices, in_a_row, metrics)
        else:
            take_step(optimizer, groups, grads)
        record: Metrics = {"step": step, "total_steps": total, "grad_norm": whole}
        record |= {f"grad_norm/{name}": value for name, value in norms.items()}
        record |= {"learning_rate": next(iter(rates.values()))}
        record |= {f"learning_rate/{name}": value for name, value in rates.items()}
        record |= {"skipped_steps": skipped, **metrics}
        log.write(watched(record, indices))
        state = {"step": step, "skipped": skipped, "in_a_row": in_a_row, "wall_s": before + time.time() - started}
        state["remembered"] = {key: value for callback in callbacks for key, value in callback.state_dict().items()}
        state["ended"] = bool(record.get(STOP))
        if snapshots.due(step, total):
            snapshots.save(model, optimizer, state, record)
        for callback in callbacks:
            callback.on_step_logged(step)
        if record.get(STOP):
            break
    snapshots.wait()
    return before + time.time() - started


def _recall(callbacks: Sequence[Callback], extra: Extra) -> None:
    """Put the callbacks where a checkpoint was made; what happens behind its step may not have happened yet.

    Raises:
        StoppedError: it was decided that the training ends there.
    """
    for callback in callbacks:
        callback.load_state_dict(extra["remembered"])
    for callback in callbacks:
        callback.on_step_logged(extra["step"])


def clip(groups: Sequence[Group], grads: Mapping[str, Tensor]) -> dict[str, float]:
    """Scale each group's gradient down to its largest norm; gives the norms before."""
    norms = {}
    for group in groups:
        own = [grads[name] for name in group.parameters]
        norms[group.name] = size = norm(own)
        if size > group.config.max_grad_norm:
            torch._foreach_mul_([local(grad) for grad in own], group.config.max_grad_norm / size)
    return norms


def take_step(optimizer: torch.optim.Optimizer, groups: Sequence[Group], grads: Mapping[str, Tensor]) -> None:
    """One step of the optimizer with these gradients."""
    for group in groups:
        for name, parameter in group.parameters.items():
            parameter.grad = grads[name]
    optimizer.step()
    optimizer.zero_grad()


def _check_skipped(step: int, indices: Sequence[int], in_a_row: int, metrics: Metrics) -> None:
    if in_a_row > MAX_SKIPPED:
        shown = {key: value for key, value in metrics.items() if not math.isfinite(value)} or metrics
        raise TrainingError(
            f"step {step}: the gradient is not finite, {in_a_row} steps in a row (rows {list(indices)[:8]}): {shown}. "
            "The parameters are as they were before these steps: lower the learning rate, or look at these rows"
        )
