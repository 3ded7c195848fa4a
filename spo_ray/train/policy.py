"""The model in training: loaded from a checkpoint, sharded if configured, and exported as a merged checkpoint."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_ray.config.train import TrainConfig
from spo_ray.core.lm_head import base_of
from spo_ray.core.sharded import is_sharded
from spo_ray.model.collate import TokenRow
from spo_ray.model.export import Probe, export
from spo_ray.model.fsdp import load_shards, whole_state
from spo_ray.model.load import build_policy, parameter_groups
from spo_ray.train.card import card_text
from spo_ray.train.distributed import Distributed
from spo_ray.train.logp_eval import Measure
from spo_ray.train.spec import TrainJob


def load_policy(job: TrainJob, rank: Distributed) -> nn.Module:
    """Load the job's model for training, with adapters phi unless it is SFT; sharded if configured.

    Collective: call on all ranks.
    """
    config = job.config
    compute = getattr(torch, config.train.precision)

    def build(device: str) -> nn.Module:
        dtype = "float64" if config.train.precision == "float64" else "float32"
        options: dict[str, Any] = {"dtype": dtype, "compute": config.train.precision, "device": device}
        model = build_policy(job.model, config.model, config.seed, with_phi=job.method is not None, **options)
        for parameter in model.parameters():
            if not parameter.requires_grad:  # frozen parameters need only the precision of the passes
                parameter.data = parameter.data.to(compute)
        return model

    prepare = partial(_checkpoint_activations, config=config.train)
    if config.train.sharding == "full" and (rank.size > 1 or config.train.cpu_offload):
        return load_shards(build, rank.mesh, compute, cpu_offload=config.train.cpu_offload, prepare=prepare)
    model = build("cpu")
    prepare(model)
    return model.to(rank.device)


def _checkpoint_activations(model: nn.Module, config: TrainConfig) -> None:
    if config.gradient_checkpointing:
        base_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def trainable(model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Return the trained parameters of theta and of phi, by name."""
    named = dict(model.named_parameters())
    theta, phi = ({name: named[name] for name in names} for names in parameter_groups(model))
    return theta, phi


def export_policy(
    job: TrainJob, measure: Measure, text: TokenRow, folder: Path | None = None, result: Mapping[str, Any] | None = None
) -> None:
    """Export the model, with the logp of one text as its probe. Collective: call on all ranks.

    ``result`` has the measurements that the model's card shows.

    Without ``folder`` it goes to the job's folder and the model can't be trained further; with one a copy is exported.
    """
    config, model, rank = job.config, measure.model, measure.rank
    logp = measure.mean_logp([text])
    whole = model
    if folder or is_sharded(model.parameters()):
        state = {key: value.clone() for key, value in whole_state(model).items()} if folder else whole_state(model)
        if rank.index == 0:
            options: dict[str, Any] = {"with_phi": job.method is not None, "device": "meta"}
            whole = build_policy(job.model, config.model, config.seed, **options)
            whole.load_state_dict(state, strict=False, assign=True)
    if rank.index == 0:
        both = config.model.export_adapter and job.method is not None and not folder
        probe, name = Probe(list(text[0]), list(text[1]), logp), job.method or "sft"
        about = card_text(job, result or {})
        export(whole, measure.chat, folder or Path(job.out), probe, method=name, backbone_and_adapter=both, about=about)
