"""The loops that run in every Ray Train worker: SFT and preference optimisation.

Workers hold full copies of the parameters; gradients are sums over all ranks, so any number of workers takes the same
steps on the same global batches.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spo_ray.config import TrainConfig
from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import Metrics
from spo_ray.core.spo import spo_gradients
from spo_ray.model.checkpoint import export_merged
from spo_ray.model.collate import collate, collate_pairs
from spo_ray.model.load import add_adapters, load_model, parameter_groups
from spo_ray.model.optim import Group, make_optimizer, make_schedule
from spo_ray.model.tokenise import ChatTokenizer
from spo_ray.run import STEP_LOG, write_json
from spo_ray.train.job import RESULT, Job
from spo_ray.train.methods import Method
from spo_ray.train.watch import StepWatch, top_answers

Row = dict[str, Any]
TokenRow = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, completion ids)."""
DRIFT_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest mean difference per token (nats) between the policy before step 0 and the stored reference."""
SCORING_BATCH = 32


@dataclass(frozen=True)
class Rank:
    """One worker among the others."""

    index: int
    size: int
    device: torch.device

    @classmethod
    def current(cls) -> "Rank":
        context = ray.train.get_context()
        return cls(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum in place over the ranks."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """Every rank's part of a global batch; the parts make up the whole."""
        return items[self.index :: self.size]


def run_job(job: Job) -> None:
    """One training run; leaves a merged checkpoint, ``log.jsonl`` and ``result.json``."""
    started, rank = time.time(), Rank.current()
    train = run_sft if job.method is None else run_preference
    result = train(job, rank)
    ray.train.report({"steps": result["steps"]})
    if rank.index == 0:
        write_json(Path(job.out) / RESULT, result | {"wall_s": time.time() - started})


def run_sft(task: Job, rank: Rank) -> dict[str, Any]:
    """Full-parameter SFT, token-mean loss over the global batch."""
    config = task.config
    chat = ChatTokenizer.load(task.model, config.model.chat_template)
    table = task.rows.rows()
    model = load_model(task.model).to(rank.device)
    recompute(model, config.train)
    params = list(model.parameters())

    def gradients(step: int, indices: Sequence[int]) -> tuple[list[Tensor], Metrics]:
        rows = [(table[i]["prompt_ids"], table[i]["completion_ids"]) for i in rank.share(indices)]
        tokens = sum(len(table[i]["completion_ids"]) for i in indices)
        batch = rank.to_device(collate(rows, chat.pad_id))
        model.train()
        model.zero_grad()
        with autocast(config.train, rank):
            logps, _ = completion_logps(model, batch["input_ids"], batch["labels"], batch["attention_mask"])
        loss = -logps.sum() / tokens
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        total = loss.detach().clone()
        rank.all_reduce([*grads, total])
        return grads, {"loss": total.item()}

    batches = list(epoch_batches(len(table), config.sft.batch_size, config.sft.epochs, config.seed))
    groups = [(params, config.sft.lr)]
    optimise(params, groups, batches, gradients, config.train, rank, Path(task.out) / STEP_LOG)
    if rank.index == 0:
        export_merged(model, chat, Path(task.out), (table[0]["prompt_ids"], table[0]["completion_ids"]))
    return {"steps": len(batches)}


def run_preference(task: Job, rank: Rank) -> dict[str, Any]:
    """One preference method from the SFT checkpoint."""
    config = task.config
    method = Method(config.methods[str(task.method)])
    chat = ChatTokenizer.load(task.model, config.model.chat_template)
    table = task.rows.rows()
    model = add_adapters(load_model(task.model), config.model, config.seed).to(rank.device)
    recompute(model, config.train)
    backbone, adapters = parameter_groups(model)
    named = dict(model.named_parameters())
    params = [named[name] for name in (*backbone, *adapters)]
    check_reference(model, chat, table, config.train, rank)
    probe, dynamics = table[: config.preference.probe_pairs], StepWatch(params, config.preference.dynamics_every)
    top_tokens = config.preference.probe_top_tokens
    tops = top_answers(model, chat, rank.share(probe), top_tokens, rank.device) if top_tokens else []

    def gradients(step: int, indices: Sequence[int]) -> tuple[list[Tensor], Metrics]:
        rows = [table[i] for i in rank.share(indices)]
        batch = rank.to_device(collate_pairs(rows, chat.pad_id))
        model.train()  # checkpointed layers compute again in training mode only; the step turns dropout off
        with autocast(config.train, rank):
            grads, metrics = spo_gradients(
                model,
                batch,
                backbone=backbone,
                adapters=adapters,
                pairs_per_backward=config.train.pairs_per_backward,
                all_reduce=rank.all_reduce,
                **method.arguments,
                **dynamics.start(step),
            )
        metrics = global_mean(metrics, len(rows), len(indices), rank)
        return list(grads.values()), metrics | method.after_step(metrics)

    def watch(record: Metrics, indices: Sequence[int]) -> Metrics:
        metrics = {}
        if dynamics.before:
            after = pair_means(model, chat, [table[i] for i in indices], config.train, rank)
            metrics |= dynamics.finish(record, after)
        step = record["step"]
        if step % config.preference.probe_every == 0 or step == record["total_steps"]:
            means = pair_means(model, chat, probe, config.train, rank)
            metrics |= {f"probe/{key}": value for key, value in means.items()}
            if top_tokens:
                metrics |= mean_logps(model, chat, tops, config.train, rank)
        return metrics

    groups = [
        ([named[n] for n in backbone], config.preference.lr_theta),
        ([named[n] for n in adapters], config.preference.lr_phi),
    ]
    batches = list(epoch_batches(len(table), config.preference.batch_size, config.preference.epochs, config.seed))
    optimise(params, groups, batches, gradients, config.train, rank, Path(task.out) / STEP_LOG, watch)
    result: dict[str, Any] = {"train": pair_means(model, chat, table, config.train, rank), "steps": len(batches)}
    if method.state_dict():
        result["method_state"] = method.state_dict()
    if task.held_out is not None:
        result["held_out"] = pair_means(model, chat, task.held_out.rows(), config.train, rank)
    if rank.index == 0:
        export_merged(model, chat, Path(task.out), (table[0]["prompt_ids"], table[0]["chosen_ids"]))
    return result


def recompute(model: nn.Module, config: TrainConfig) -> None:
    """Switch on gradient checkpointing where it is configured."""
    if config.gradient_checkpointing:
        unwrap = getattr(model, "get_base_model", None)  # PEFT's
        base: Any = unwrap() if callable(unwrap) else model
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def optimise(
    params: Sequence[Tensor],
    groups: Sequence[Group],
    batches: Sequence[Sequence[int]],
    gradients: Callable[[int, Sequence[int]], tuple[list[Tensor], Metrics]],
    config: TrainConfig,
    rank: Rank,
    log: Path,
    watch: Callable[[Metrics, Sequence[int]], Metrics] = lambda record, indices: {},
) -> None:
    """AdamW over the global batches; rank 0 writes one JSON line a step, and one for the state before step 0.

    ``gradients(step, indices)`` gives the gradient for ``params`` on a global batch of row indices; ``watch(record,
    indices)`` adds metrics about the state after the recorded step.

    Raises:
        FloatingPointError: a gradient that is not finite.
    """
    optimizer = make_optimizer(groups, config.weight_decay)
    schedule = make_schedule(optimizer, config.schedule, len(batches), config.warmup_ratio)
    total = len(batches)
    with log.open("w") if rank.index == 0 else nullcontext() as file:
        start: Metrics = {"step": 0, "total_steps": total}
        _record(file, start | watch(start, []))
        for step, indices in enumerate(batches, start=1):
            grads, metrics = gradients(step, indices)
            for parameter, grad in zip(params, grads, strict=True):
                parameter.grad = grad
            norm = nn.utils.clip_grad_norm_(params, config.max_grad_norm).item()
            if not math.isfinite(norm):
                raise FloatingPointError(f"step {step}: the gradient is not finite (rows {list(indices)}): {metrics}")
            optimizer.step()
            schedule.step()
            rate = float(schedule.get_last_lr()[0])
            record: Metrics = {"step": step, "total_steps": total, "grad_norm": norm, "learning_rate": rate, **metrics}
            _record(file, record | watch(record, indices))


def _record(file: TextIO | None, record: dict[str, Any]) -> None:
    if file is not None:
        file.write(json.dumps(record) + "\n")
        file.flush()


def epoch_batches(rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Global batches of row indices: every row exactly once an epoch, in batches whose sizes differ by one at most."""
    rng = random.Random(seed)
    count = -(-rows // batch_size)
    for _ in range(epochs):
        order = rng.sample(range(rows), rows)
        yield from (order[i * rows // count : (i + 1) * rows // count] for i in range(count))


def pair_means(model: nn.Module, chat: ChatTokenizer, table: Sequence[Row], config: TrainConfig, rank: Rank) -> Metrics:
    """Means over pairs: log-probabilities of both sides, their change since the reference, and preference accuracy."""
    sums = torch.zeros(5, dtype=torch.float64, device=rank.device)
    for batch in scoring_batches(rank.share(table), chat, rank):
        chosen, rejected = (side_logps(model, batch, side, config, rank) for side in ("chosen", "rejected"))
        gain_w, gain_l = chosen - batch["ref_chosen_logps"], rejected - batch["ref_rejected_logps"]
        columns = (chosen, rejected, gain_w, gain_l, (gain_w > gain_l).double())
        sums += torch.stack([column.double().sum() for column in columns])
    rank.all_reduce([sums])
    keys = ("logps/chosen", "logps/rejected", "delta_logp_chosen", "delta_logp_rejected", "accuracy")
    return dict(zip(keys, (sums / len(table)).tolist(), strict=True)) | {"n": len(table)}


def mean_logps(
    model: nn.Module, chat: ChatTokenizer, rows: Sequence[TokenRow], config: TrainConfig, rank: Rank
) -> Metrics:
    """Mean log-probability over all ranks' answers (prompt ids, completion ids); empty without any."""
    sums = torch.zeros(2, dtype=torch.float64, device=rank.device)
    for start in range(0, len(rows), SCORING_BATCH):
        tensors = collate(rows[start : start + SCORING_BATCH], chat.pad_id)
        batch = rank.to_device({f"top_{key}": value for key, value in tensors.items()})
        logps = side_logps(model, batch, "top", config, rank)
        sums += torch.stack([logps.double().sum(), torch.ones_like(logps, dtype=torch.float64).sum()])
    rank.all_reduce([sums])
    total, count = sums.tolist()
    return {"probe/logps/top": total / count} if count else {}


def check_reference(
    model: nn.Module, chat: ChatTokenizer, table: Sequence[Row], config: TrainConfig, rank: Rank
) -> None:
    """Before step 0 the policy is the reference: anything else means stale or mismatched reference log-probabilities.

    Raises:
        RuntimeError: they differ; the DPO loss would not start at ln 2.
    """
    rows = rank.share(table[:SCORING_BATCH])
    difference = tokens = 0.0
    for batch in scoring_batches(rows, chat, rank):
        gap = (side_logps(model, batch, "chosen", config, rank) - batch["ref_chosen_logps"]).abs()
        difference += gap.sum().item()
        tokens += (batch["chosen_labels"] >= 0).sum().item()
    if tokens and not difference / tokens <= DRIFT_TOLERANCE[config.precision]:
        raise RuntimeError(
            f"the policy before step 0 differs from the stored reference by {difference / tokens:.2g} nats a token: "
            "the reference log-probabilities belong to another model, tokenizer or precision"
        )


def scoring_batches(table: Sequence[Row], chat: ChatTokenizer, rank: Rank) -> Iterator[dict[str, Tensor]]:
    """A rank's rows in batches for inference."""
    for start in range(0, len(table), SCORING_BATCH):
        yield rank.to_device(collate_pairs(table[start : start + SCORING_BATCH], chat.pad_id))


@torch.no_grad()
def side_logps(model: nn.Module, batch: Mapping[str, Tensor], side: str, config: TrainConfig, rank: Rank) -> Tensor:
    """Log-probabilities [B] of one side of a batch."""
    model.eval()
    keys = ("input_ids", "labels", "attention_mask")
    with autocast(config, rank):
        return completion_logps(model, *(batch[f"{side}_{key}"] for key in keys))[0]


def global_mean(metrics: Metrics, local: int, total: int, rank: Rank) -> Metrics:
    """Means over the global batch of per-rank means."""
    values = torch.tensor([*metrics.values()], dtype=torch.float64, device=rank.device) * (local / total)
    rank.all_reduce([values])
    return dict(zip(metrics, values.tolist(), strict=True))


def autocast(config: TrainConfig, rank: Rank) -> AbstractContextManager[Any]:
    """The compute precision."""
    return torch.autocast(rank.device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")
