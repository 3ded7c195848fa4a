"""The two kinds of training, SFT and preference optimisation, as every worker runs them.

Any number of workers takes the same steps on the same global batches: losses are divided by global counts, and
gradients are summed over the ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo_ray.core.batch_gradients import tokens_per_backward
from spo_ray.core.gradients import GradientAccumulator, accumulate
from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import Metrics
from spo_ray.core.sharded import is_sharded
from spo_ray.core.spo import spo_gradients
from spo_ray.model.collate import TokenRow, collate, collate_pairs
from spo_ray.model.optimizer import Group
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, write_json, write_rows
from spo_ray.train.alarm import Alarm
from spo_ray.train.callbacks import AlarmCallback, DynamicsCallback, ProbePairsCallback, TextHealthCallback
from spo_ray.train.checkpointer import Checkpointer
from spo_ray.train.data_loader import RowTable, epoch_batches
from spo_ray.train.distributed import Distributed
from spo_ray.train.logp_eval import Measure, means
from spo_ray.train.loop import optimise
from spo_ray.train.method_state import Method
from spo_ray.train.policy import export_policy, load_policy, trainable
from spo_ray.train.score_gate import ScoreGate
from spo_ray.train.spec import CHANGES, RESULT, TrainJob

TableOf = Callable[[Artifact], RowTable]
Parameters = Mapping[str, Tensor]


def run_job(job: TrainJob, rank: Distributed, checkpointer: Checkpointer, table_of: TableOf) -> None:
    """Run one training; writes a merged checkpoint, ``log.jsonl`` and ``result.json``. Collective."""
    chat = ChatTokenizer.load(job.model, job.config.model)
    measure = Measure(load_policy(job, rank), chat, job.config.train, rank)
    run = run_sft if job.method is None else run_preference
    result = run(job, measure, checkpointer, table_of)
    if rank.index == 0:
        write_json(Path(job.out) / RESULT, result)


def run_sft(job: TrainJob, measure: Measure, checkpointer: Checkpointer, table_of: TableOf) -> dict[str, Any]:
    """Train theta with the token-mean SFT loss over the global batch; return the result."""
    settings, table = job.config.sft, table_of(job.rows)
    assert settings is not None  # else the job has no such stage
    theta, _ = trainable(measure.model)
    gradients = partial(sft_gradients, measure, theta, table)
    batches = list(epoch_batches(len(table), settings.batch_size, settings.epochs, job.config.seed))
    groups = [Group("theta", theta, settings)]
    wall_s = optimise(job, measure.model, groups, batches, gradients, checkpointer)
    export_policy(job, measure, first_text(table, "completion_ids"))
    return {"steps": len(batches), "wall_s": wall_s}


def run_preference(job: TrainJob, measure: Measure, checkpointer: Checkpointer, table_of: TableOf) -> dict[str, Any]:
    """Train theta and phi with one preference method, from the reference model; return the result."""
    settings, method, table = job.config.preference, Method(job.config.methods[str(job.method)]), table_of(job.rows)
    held_out = table_of(job.held_out) if job.held_out is not None else None
    (theta, phi), text = trainable(measure.model), first_text(table, "chosen_ids")
    measure.check_reference(table)

    dynamics = DynamicsCallback([*theta.values(), *phi.values()], settings.dynamics_every, measure, table)
    probes, health = ProbePairsCallback(job, measure, table, held_out), TextHealthCallback(job, measure, table)
    alarm = Alarm(settings.alarm)
    gate = ScoreGate(job, measure.rank, partial(export_policy, job, measure, text))
    callbacks = [method, dynamics, probes, health, AlarmCallback(alarm), gate]

    gradients = partial(preference_gradients, measure, theta, phi, table, method, dynamics)
    batches = list(epoch_batches(len(table), settings.batch_size, settings.epochs, job.config.seed))
    rate = {} if method.lr is None else {"lr": method.lr}
    groups = [
        Group("theta", theta, settings.theta.model_copy(update=rate)),
        Group("phi", phi, settings.phi.model_copy(update=rate)),
    ]
    wall_s = optimise(job, measure.model, groups, batches, gradients, checkpointer, callbacks)

    best = checkpointer.restore_best(measure.model)
    logps = measure.pair_logps(table, range(len(table)))
    if measure.rank.index == 0:
        write_changes(Path(job.out) / CHANGES, table, logps)
    result: dict[str, Any] = {"train": means(logps), "steps": len(batches)}
    result |= {} if best is None else {"exported_step": best}
    result |= {"method_state": method.state_dict()} if method.state_dict() else {}
    result |= alarm.result()
    if held_out is not None:
        result["held_out"] = measure.pair_means(held_out, range(len(held_out)))
    export_policy(job, measure, text, result=result)
    return result | {"wall_s": wall_s}


def write_changes(path: Path, table: RowTable, logps: Tensor) -> None:
    """Write how each pair's logps changed (:class:`spo_ray.runtime.schema.PairChange`)."""
    kept = table.table.select([name for name in ("id", "ches", "ches_per_token") if name in table.table.column_names])
    changes = zip(kept.to_pylist(), *logps[2:4].tolist(), strict=True)
    rows = [row | {"delta_logp_chosen": w, "delta_logp_rejected": lost} for row, w, lost in changes]
    write_rows(path, rows, schema.PairChange)


def sft_gradients(
    measure: Measure, theta: Parameters, table: RowTable, step: int, indices: Sequence[int]
) -> tuple[Parameters, Metrics]:
    """Return gradients and loss of the SFT loss over a global batch, averaged over its completion tokens."""
    model, rank = measure.model, measure.rank
    numbers, valid = rank.shard_with_padding(indices)
    rows = [(row["prompt_ids"], row["completion_ids"]) for row in table.rows(numbers)]
    counts = torch.tensor([len(completion) for _, completion in rows], dtype=torch.float64, device=rank.device)
    counts *= torch.tensor(valid, device=rank.device)
    loss, tokens = torch.zeros_like(counts[0]), counts.sum()
    rank.all_reduce([tokens])
    accumulator = GradientAccumulator(list(theta.values()))
    size = rows_per_backward(rows, measure, sharded=is_sharded(theta.values()))
    model.train()
    for start in range(0, len(rows), size):
        batch = rank.to_device(collate(rows[start : start + size], measure.chat.pad_id))
        weights = -(counts[start : start + size] > 0).double() / tokens
        with measure.autocast():
            logps, _ = completion_logps(model, batch["input_ids"], batch["labels"], batch["attention_mask"])
        accumulate(logps, [(accumulator, weights)])
        loss += (logps.detach() * weights).sum()
    grads = accumulator.gradients()
    rank.all_reduce([loss] if is_sharded(grads) else [*grads, loss])
    return dict(zip(theta, grads, strict=True)), {"loss": loss.item()}


def preference_gradients(
    measure: Measure,
    theta: Parameters,
    phi: Parameters,
    table: RowTable,
    method: Method,
    dynamics: DynamicsCallback,
    step: int,
    indices: Sequence[int],
) -> tuple[Parameters, Metrics]:
    """Return gradients and metrics of a preference method on a global batch of pairs."""
    config, rank = measure.config, measure.rank
    numbers, valid = rank.shard_with_padding(indices)
    rows = table.rows(numbers)
    batch = rank.to_device(collate_pairs(rows, measure.chat.pad_id) | {"valid": torch.tensor(valid)})
    sides = [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    sharded = is_sharded([*theta.values(), *phi.values()])
    agreed = rows_per_backward(sides, measure, sharded=True) if sharded else None
    measure.model.train()  # layers recompute activations in training mode only; the step itself disables dropout
    with measure.autocast():
        grads, metrics = spo_gradients(
            measure.model,
            batch,
            backbone=list(theta),
            adapters=list(phi),
            pairs_per_backward=agreed or config.pairs_per_backward,
            side_gradients=dynamics.on_step_begin(step),
            all_reduce=rank.all_reduce,
            **method.at(step),
        )
    metrics = global_mean(metrics, sum(valid), len(indices), rank)
    return grads, metrics | method.after_step(metrics)


def rows_per_backward(rows: Sequence[TokenRow], measure: Measure, *, sharded: bool) -> int:
    """Return how many rows share a backward pass, the same number on all ranks. Collective."""
    rank = measure.rank
    longest = rank.largest(max(len(prompt) + len(completion) for prompt, completion in rows))
    return measure.config.pairs_per_backward or max(1, tokens_per_backward(rank.device.type, sharded) // longest)


def global_mean(metrics: Metrics, local: int, total: int, rank: Distributed) -> Metrics:
    """Return the mean over all ``total`` pairs of a global batch, from each rank's mean over ``local`` pairs."""
    values = torch.tensor([*metrics.values()], dtype=torch.float64, device=rank.device) * (local / total)
    rank.all_reduce([values])
    return dict(zip(metrics, values.tolist(), strict=True))


def first_text(table: RowTable, side: str) -> TokenRow:
    """Return prompt and completion of the first row, the probe text of exported checkpoints."""
    (row,) = table.rows([0])
    return row["prompt_ids"], row[side]
