"""The optimisation loop that SFT and every preference method share."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_ray.core.gradients import norm
from spo_ray.core.losses import Metrics
from spo_ray.core.sharded import local
from spo_ray.errors import TrainingError
from spo_ray.model.optim import Group, learning_rates, make_optimizer
from spo_ray.train.rank import Rank
from spo_ray.train.snapshots import Snapshots
from spo_ray.train_config import TrainConfig

GradientsOf = Callable[[int, Sequence[int]], tuple[Mapping[str, Tensor], Metrics]]
"""Gradients by parameter name and metrics of a step (from 1) on a global batch of row numbers."""
Watch = Callable[[Metrics, Sequence[int]], Metrics]
"""Metrics about the state after a recorded step."""


@dataclass
class Remembered:
    """What a run remembers between steps, beside tensors."""

    state: Callable[[], dict[str, Any]] = dict
    load: Callable[[dict[str, Any]], None] = lambda state: None


class StepLog:
    """``log.jsonl``: one JSON line a step, and one for the state before step 0. Rank 0 writes it."""

    def __init__(self, path: Path, rank: Rank) -> None:
        self.path = path if rank.index == 0 else None

    def start(self, step: int) -> None:
        """Keep what was written up to a step, and nothing after it; with step 0: nothing at all."""
        if self.path is not None:
            lines = self.path.read_text().splitlines(keepends=True) if step else []
            self.path.write_text("".join(lines[: step + 1]))

    def write(self, record: Metrics) -> None:
        """Add a step; what is no finite number becomes null."""
        if self.path is not None:
            values = {key: value if math.isfinite(value) else None for key, value in record.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def optimise(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Sequence[int]],
    gradients: GradientsOf,
    config: TrainConfig,
    rank: Rank,
    log: StepLog,
    snapshots: Snapshots,
    watch: Watch = lambda record, indices: {},
    remembered: Remembered | None = None,
) -> float:
    """AdamW over the global batches, from the newest checkpoint on if there is one; gives the seconds it took in all.

    Raises:
        TrainingError: more steps in a row than configured without a finite gradient, or a checkpoint can't be written.
    """
    started, remembered = time.time(), remembered or Remembered()
    optimizer = make_optimizer(groups, config.optimizer)
    extra = snapshots.restore(model, optimizer)
    first, total = extra.get("step", 0) + 1, len(batches)
    skipped, in_a_row, before = extra.get("skipped", 0), extra.get("in_a_row", 0), extra.get("wall_s", 0.0)
    log.start(first - 1)
    if extra:
        remembered.load(extra["remembered"])
    else:
        start: Metrics = {"step": 0, "total_steps": total}
        log.write(start | watch(start, []))
    for step, indices in enumerate(batches[first - 1 :], start=first):
        rates = learning_rates(optimizer, groups, step - 1, total)
        grads, metrics = gradients(step, indices)
        norms = clip(groups, grads)
        whole = math.hypot(*norms.values())
        in_a_row = 0 if math.isfinite(whole) else in_a_row + 1
        if in_a_row:
            skipped += 1
            _check_skipped(step, indices, in_a_row, config.max_skipped_steps, metrics)
        else:
            take_step(optimizer, groups, grads)
        record: Metrics = {"step": step, "total_steps": total, "grad_norm": whole}
        record |= {f"grad_norm/{name}": value for name, value in norms.items()}
        record |= {"learning_rate": next(iter(rates.values()))}
        record |= {f"learning_rate/{name}": value for name, value in rates.items()}
        record |= {"skipped_steps": skipped, **metrics}
        record |= watch(record, indices)
        log.write(record)
        if snapshots.due(step, total):
            state = {"step": step, "skipped": skipped, "in_a_row": in_a_row, "wall_s": before + time.time() - started}
            snapshots.save(model, optimizer, state | {"remembered": remembered.state()}, record)
    snapshots.wait()
    return before + time.time() - started


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


def _check_skipped(step: int, indices: Sequence[int], in_a_row: int, allowed: int, metrics: Metrics) -> None:
    if in_a_row > allowed:
        shown = {key: value for key, value in metrics.items() if not math.isfinite(value)} or metrics
        raise TrainingError(
            f"step {step}: the gradient is not finite, {in_a_row} steps in a row (rows {list(indices)[:8]}): {shown}. "
            "The parameters are as they were before these steps: lower the learning rate, or look at these rows"
        )
