"""Trainings of the study: the pipeline's methods, and the variants of SPO that the hypotheses are about."""

import copy
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from pydantic import TypeAdapter
from torch import Tensor, nn

from benchmarks.study.world import Pair, World, batches, settings
from spo_ray.config.methods import MethodConfig
from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import Metrics, PairLogps, dpo
from spo_ray.core.spo import spo_gradients
from spo_ray.model.collate import collate, collate_pairs
from spo_ray.model.load import parameter_groups
from spo_ray.model.optimizer import Group, learning_rates, make_optimizer
from spo_ray.train.loop import clip
from spo_ray.train.method_state import Method

Gradients = dict[str, Tensor]
OWN_SHARE = {"chosen": 0.0, "both": 0.5, "own": 1.0}
"""Share of the SFT loss that is on the reference's own samples, by name of the anchor."""


@dataclass(frozen=True)
class Recipe:
    """A training: a method of the configuration, and what the study changes of its step."""

    method: Mapping[str, Any]
    """The method as in ``methods.NAME``, with its rate."""
    theta: str = "all"
    """Gradient of theta: ``all`` of the objective, or ``sft`` alone, the lower level of equation (7)."""
    anchor: str = "chosen"
    """Answers of the SFT loss: ``chosen``, the reference's ``own`` samples to the same questions, or half ``both``."""
    drop: float = 0.0
    """Share of the pairs that are left out: those with the highest CHES scores."""
    epochs: int = 3


def hinged(batch: PairLogps, *, beta: float, weight: float, slack: float = 0.0) -> tuple[Tensor, Metrics]:
    """``L_DPO + weight * max(0, -r_w - slack)``: the SFT loss of those pairs alone whose chosen answer has fallen."""
    loss, metrics = dpo(batch, beta=beta)
    fall = torch.relu(-batch.ratios[0] - slack)
    return loss + weight * fall.mean(), metrics | {"hinged/active": (fall > 0).double().mean().item()}


@dataclass
class Trained:
    """A trained policy, and what its steps said."""

    policy: nn.Module
    metrics: dict[str, float]
    """Means over the steps."""
    seconds: float


def train(world: World, recipe: Recipe, seed: int) -> Trained:
    """Train from the world's reference; deterministic for one number of threads.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    policy, config = world.policy(seed), settings()
    method = Method(TypeAdapter(MethodConfig).validate_python(recipe.method))
    backbone, adapters = parameter_groups(policy)
    named = dict(policy.named_parameters())
    rate = {} if method.lr is None else {"lr": method.lr}
    groups = [
        Group(name, {key: named[key] for key in keys}, section.model_copy(update=rate))
        for name, keys, section in (
            ("theta", backbone, config.preference.theta),
            ("phi", adapters, config.preference.phi),
        )
    ]
    optimizer = make_optimizer(groups, "adamw")
    plan = list(batches(kept(world, recipe.drop), config.preference.batch_size, recipe.epochs, seed))
    began, logs = time.perf_counter(), []
    for step, rows in enumerate(plan):
        learning_rates(optimizer, groups, step, len(plan))
        grads, metrics = gradients(policy, world, rows, method.at(step + 1), (backbone, adapters), recipe)
        for name, grad in grads.items():
            named[name].grad = grad
        norms = clip(groups, grads)
        optimizer.step()
        logs.append(metrics | norms | method.after_step(metrics))
    means = {key: sum(log[key] for log in logs if key in log) / len(logs) for key in logs[-1]}
    return Trained(policy.eval(), means, time.perf_counter() - began)


def gradients(
    policy: nn.Module,
    world: World,
    rows: Sequence[Pair],
    arguments: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    recipe: Recipe,
) -> tuple[Gradients, Metrics]:
    """Return the gradient of one step by parameter, and its metrics."""
    backbone, adapters = groups
    batch, weight = collate_pairs(rows, world.chat.pad_id), arguments["lambda_sft"]
    own_weight = weight * OWN_SHARE[recipe.anchor]
    if own_weight:
        arguments = arguments | {"lambda_sft": weight - own_weight, "inner_steps": 0}
    sides: dict[str, Any] | None = {} if recipe.theta == "sft" else None
    found, metrics = spo_gradients(
        policy, batch, backbone=backbone, adapters=adapters, side_gradients=sides, **arguments
    )
    if sides is not None:
        for name, grad in zip(backbone, sides["chosen"], strict=False):
            found[name] = -weight * grad
    if own_weight:
        named = dict(policy.named_parameters())
        ids = collate([(row["prompt_ids"], row["own_ids"]) for row in rows], world.chat.pad_id)
        loss = -completion_logps(policy, **ids)[0].mean()
        for name, grad in zip(backbone, torch.autograd.grad(loss, [named[name] for name in backbone]), strict=True):
            found[name] = found[name] + own_weight * grad
    return found, metrics


def kept(world: World, drop: float) -> list[Pair]:
    """Return the world's pairs without the share that has the highest CHES scores."""
    order = sorted(world.pairs, key=lambda pair: pair["ches"])
    left = {id(pair) for pair in order[: round(len(order) * (1 - drop))]}
    return [pair for pair in world.pairs if id(pair) in left]


@contextmanager
def dialled(policy: nn.Module, scale: float) -> Generator[nn.Module]:
    """Multiply what the adapters phi add to the backbone by ``scale`` in the context."""
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer, values in zip(layers, before, strict=True):
        layer.scaling |= {name: scale * value for name, value in values.items()}
    try:
        yield policy
    finally:
        for layer, values in zip(layers, before, strict=True):
            layer.scaling |= values


def interpolated(world: World, policy: Any, share: float) -> nn.Module:
    """Return a model whose weights lie at ``share`` of the way from the reference to the policy."""
    merged = copy.deepcopy(policy).merge_and_unload()
    weights = dict(world.reference.named_parameters())
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(torch.lerp(weights[name], parameter, share))
    return merged
