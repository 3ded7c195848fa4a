"""The two kinds of training that run in every worker: SFT and preference optimisation.

Any number of workers takes the same steps on the same global batches: losses are divided by global counts, gradients
are sums over the ranks.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray.train
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from spo_ray.config.train import TrainConfig
from spo_ray.core.batch_gradients import tokens_per_backward
from spo_ray.core.gradients import GradientAccumulator, accumulate
from spo_ray.core.lm_head import base_of
from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import Metrics
from spo_ray.core.sharded import is_sharded
from spo_ray.core.spo import spo_gradients
from spo_ray.model.collate import TokenRow, collate, collate_pairs
from spo_ray.model.export import Probe, export
from spo_ray.model.fsdp import load_shards, whole_state
from spo_ray.model.load import build_policy, parameter_groups
from spo_ray.model.memory import Device, check_memory, estimate_memory
from spo_ray.model.optimizer import Group
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.runtime.artifact import Artifact, write_json
from spo_ray.train.alarm import Alarm
from spo_ray.train.callbacks import AlarmCallback, DynamicsCallback, ProbePairsCallback, TextHealthCallback
from spo_ray.train.checkpointer import Checkpointer
from spo_ray.train.data_loader import RowTable, epoch_batches
from spo_ray.train.distributed import Distributed
from spo_ray.train.logp_eval import Measure, compute_type
from spo_ray.train.loop import Callback, optimise
from spo_ray.train.method_state import Method
from spo_ray.train.score_gate import wait_for_decision
from spo_ray.train.spec import RESULT, Job

TableOf = Callable[[Artifact], RowTable]


class RetainedMemory:
    """What a worker's process has kept of the main memory that earlier jobs took, for the next one to use."""

    def __init__(self) -> None:
        self.before = self._resident()

    def now(self) -> int:
        """Bytes."""
        return max(0, self._resident() - self.before)

    @staticmethod
    def _resident() -> int:
        gc.collect()  # models are in reference cycles
        torch.cuda.empty_cache()
        return psutil.Process().memory_info().rss


def check_room(job: Job, rank: Distributed, held: int = 0) -> None:
    """Compare the memory plan with what this worker has, before anything is allocated.

    ``held`` are bytes of main memory that this process has and does not use: on a CPU the allocator keeps them.

    Raises:
        UserError: it can't fit; with the plan, and settings with which it would.
    """
    config, device = job.config, rank.device
    if not config.train.memory_check:
        return
    method = None if job.method is None else config.methods[job.method]
    kind: Device = "cpu" if device.type == "cpu" else "cuda"
    plan = estimate_memory(config, AutoConfig.from_pretrained(job.model), job.method or "sft", method, kind)
    if kind == "cuda":
        room = torch.cuda.mem_get_info(device)[0]
    else:  # shared with the other workers of the node
        room = psutil.virtual_memory().available // ray.train.get_context().get_local_world_size() + held
    check_memory(plan, room, job.method or "sft")


def run_job(job: Job, rank: Distributed, snapshots: Checkpointer, table_of: TableOf) -> None:
    """One training run; leaves a merged checkpoint, ``log.jsonl`` and ``result.json``."""
    train = run_sft if job.method is None else run_preference
    result = train(job, rank, snapshots, table_of)
    if rank.index == 0:
        write_json(Path(job.out) / RESULT, result)


def run_sft(job: Job, rank: Distributed, snapshots: Checkpointer, table_of: TableOf) -> dict[str, Any]:
    """SFT of theta, token-mean loss over the global batch."""
    config = job.config
    chat, table = ChatTokenizer.load(job.model, config.model.chat_template), table_of(job.rows)
    model = load_policy(job, rank, with_phi=False)
    params = trainable(model)

    def gradients(step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], Metrics]:
        numbers, valid = rank.shard_with_padding(indices)
        rows = [(row["prompt_ids"], row["completion_ids"]) for row in table.rows(numbers)]
        counts = torch.tensor([len(completion) for _, completion in rows], dtype=torch.float64, device=rank.device)
        counts *= torch.tensor(valid, device=rank.device)
        loss, tokens = torch.zeros_like(counts[0]), counts.sum()
        rank.all_reduce([tokens])
        sink = GradientAccumulator(list(params.values()))
        size = rows_per_backward(rows, config.train, rank, is_sharded(params.values()))
        model.train()
        for start in range(0, len(rows), size):
            batch = rank.to_device(collate(rows[start : start + size], chat.pad_id))
            weights = -(counts[start : start + size] > 0).double() / tokens
            with compute_type(model, config.train, rank):
                logps, _ = completion_logps(model, batch["input_ids"], batch["labels"], batch["attention_mask"])
            accumulate(logps, [(sink, weights)])
            loss += (logps.detach() * weights).sum()
        grads = sink.gradients()
        rank.all_reduce([loss] if is_sharded(grads) else [*grads, loss])
        return dict(zip(params, grads, strict=True)), {"loss": loss.item()}

    batches = list(epoch_batches(len(table), config.sft.batch_size, config.sft.epochs, config.seed))
    groups = [Group("theta", params, config.sft)]
    wall_s = optimise(job, model, groups, batches, gradients, rank, snapshots)
    save(model, job, rank, chat, first_text(table, "completion_ids"))
    return {"steps": len(batches), "wall_s": wall_s}


def run_preference(job: Job, rank: Distributed, snapshots: Checkpointer, table_of: TableOf) -> dict[str, Any]:
    """One preference method from the SFT checkpoint."""
    config = job.config
    method, settings = Method(config.methods[str(job.method)]), config.preference
    chat, table = ChatTokenizer.load(job.model, config.model.chat_template), table_of(job.rows)
    held_out = table_of(job.held_out) if job.held_out is not None else None
    text = first_text(table, "chosen_ids")
    model = load_policy(job, rank, with_phi=True)
    params = trainable(model)
    backbone, adapters = parameter_groups(model)
    measure = Measure(model, chat, config.train, rank)
    measure.check_reference(table)
    dynamics = DynamicsCallback(list(params.values()), settings.dynamics_every, measure, table)
    alarm = Alarm(settings.alarm)
    probes, health = ProbePairsCallback(job, measure, table, held_out), TextHealthCallback(job, measure, table)
    callbacks = [method, dynamics, probes, health, AlarmCallback(alarm, method), ScoreGate(job, measure, text)]

    def gradients(step: int, indices: Sequence[int]) -> tuple[Mapping[str, Tensor], Metrics]:
        numbers, valid = rank.shard_with_padding(indices)
        rows = table.rows(numbers)
        batch = rank.to_device(collate_pairs(rows, chat.pad_id) | {"valid": torch.tensor(valid)})
        sides = [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
        agreed = rows_per_backward(sides, config.train, rank, True) if is_sharded(params.values()) else None
        model.train()  # checkpointed layers compute again in training mode only; the step turns dropout off
        with compute_type(model, config.train, rank):
            grads, metrics = spo_gradients(
                model,
                batch,
                backbone=backbone,
                adapters=adapters,
                pairs_per_backward=agreed or config.train.pairs_per_backward,
                all_reduce=rank.all_reduce,
                **method.arguments,
                **dynamics.start(step),
            )
        metrics = global_mean(metrics, sum(valid), len(indices), rank)
        return grads, metrics | method.after_step(metrics)

    rate = {} if method.lr is None else {"lr": method.lr}
    groups = [
        Group("theta", {name: params[name] for name in backbone}, settings.theta.model_copy(update=rate)),
        Group("phi", {name: params[name] for name in adapters}, settings.phi.model_copy(update=rate)),
    ]
    batches = list(epoch_batches(len(table), settings.batch_size, settings.epochs, config.seed))
    wall_s = optimise(job, model, groups, batches, gradients, rank, snapshots, callbacks)
    best = snapshots.best()
    chosen = {"exported_step": snapshots.load(best, model, None)["step"]} if best else {}
    result: dict[str, Any] = {"train": measure.pair_means(table, range(len(table))), "steps": len(batches)} | chosen
    if method.state_dict():
        result["method_state"] = method.state_dict()
    result |= alarm.result()
    if held_out is not None:
        result["held_out"] = measure.pair_means(held_out, range(len(held_out)))
    save(model, job, rank, chat, text)
    return result | {"wall_s": wall_s}


class ScoreGate(Callback):
    """Checkpoints that are scored on the way, see :mod:`spo_ray.train.score_gate`."""

    def __init__(self, job: Job, measure: Measure, text: TokenRow) -> None:
        self.job, self.measure, self.text = job, measure, text

    def on_step_logged(self, step: int) -> None:
        """Wait for the decision, where there is one to come."""
        job, measure = self.job, self.measure
        if step in job.score_at[:-1]:
            export = partial(save, measure.model, job, measure.rank, measure.chat, self.text)
            wait_for_decision(job.out, step, measure.rank, export)


def load_policy(job: Job, rank: Distributed, *, with_phi: bool) -> nn.Module:
    """The model as it is trained: in shards where there are several workers, unless configured otherwise."""
    config = job.config
    compute = getattr(torch, config.train.precision)

    def build(device: str) -> nn.Module:
        dtype = "float64" if config.train.precision == "float64" else "float32"
        options: dict[str, Any] = {"dtype": dtype, "compute": config.train.precision, "device": device}
        model = build_policy(job.model, config.model, config.seed, with_phi=with_phi, **options)
        for parameter in model.parameters():
            if not parameter.requires_grad:  # what is not trained needs no more than passes do
                parameter.data = parameter.data.to(compute)
        return model

    prepare = partial(recompute, config=config.train)
    if config.train.sharding == "full" and (rank.size > 1 or config.train.cpu_offload):
        return load_shards(build, rank.mesh, compute, cpu_offload=config.train.cpu_offload, prepare=prepare)
    model = build("cpu")
    prepare(model)
    return model.to(rank.device)


def recompute(model: nn.Module, config: TrainConfig) -> None:
    """Switch on gradient checkpointing where it is configured."""
    if config.gradient_checkpointing:
        base_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of theta, then phi, by their names."""
    named = dict(model.named_parameters())
    return {name: named[name] for names in parameter_groups(model) for name in names}


def rows_per_backward(rows: Sequence[TokenRow], config: TrainConfig, rank: Distributed, sharded: bool) -> int:
    """How many rows share a backward, the same on all ranks."""
    longest = rank.largest(max(len(prompt) + len(completion) for prompt, completion in rows))
    return config.pairs_per_backward or max(1, tokens_per_backward(rank.device.type, sharded) // longest)


def global_mean(metrics: Metrics, local: int, total: int, rank: Distributed) -> Metrics:
    """Means over the global batch of per-rank means."""
    values = torch.tensor([*metrics.values()], dtype=torch.float64, device=rank.device) * (local / total)
    rank.all_reduce([values])
    return dict(zip(metrics, values.tolist(), strict=True))


def first_text(table: RowTable, side: str) -> TokenRow:
    """Prompt and completion of the first row, the probe text of checkpoints."""
    (row,) = table.rows([0])
    return row["prompt_ids"], row[side]


def save(
    model: nn.Module, job: Job, rank: Distributed, chat: ChatTokenizer, text: TokenRow, folder: Path | None = None
) -> None:
    """Export the model, with the log-probability of one row as its probe; a collective.

    With a ``folder`` of its own a copy is exported, and the model can be trained further.
    """
    config = job.config
    logp = Measure(model, chat, config.train, rank).mean_logp([text])
    whole = model
    if folder or is_sharded(model.parameters()):
        state = {key: value.clone() for key, value in whole_state(model).items()} if folder else whole_state(model)
        if rank.index == 0:
            options: dict[str, Any] = {"with_phi": job.method is not None, "device": "meta"}
            whole = build_policy(job.model, config.model, config.seed, **options)
            whole.load_state_dict(state, strict=False, assign=True)
    if rank.index == 0:
        both = config.model.export_adapter and job.method is not None
        probe, name = Probe(list(text[0]), list(text[1]), logp), job.method or "sft"
        export(whole, chat, folder or Path(job.out), probe, method=name, backbone_and_adapter=both and not folder)
