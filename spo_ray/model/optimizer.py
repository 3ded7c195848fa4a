"""Optimizers and learning rates of the parameter groups theta and phi."""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_ray.config.train import GroupConfig
from spo_ray.errors import UserError


class Group(NamedTuple):
    """Parameters with one optimizer configuration: theta, or phi."""

    name: str
    parameters: Mapping[str, Tensor]
    """Parameters by their names in the model."""
    config: GroupConfig


def make_optimizer(groups: Sequence[Group], kind: str) -> torch.optim.Optimizer:
    """Make an AdamW with a learning rate for each group (equations 12 to 14).

    A group becomes two of the optimizer's: matrices with weight decay, and norms and biases without. Both have the
    group's ``name`` and ``initial_lr``. Parameters may be sharded (DTensor).

    Args:
        groups: theta and phi; a group without parameters is left out.
        kind: ``adamw``; or ``adamw_8bit``, whose two states take 8 bits and a scale per 256 values. Parameters, or
            shards, of less than 4,096 values, or of no multiple of 256, keep float32 states there.

    Raises:
        UserError: ``adamw_8bit``, and torchao is not installed.
    """
    parts = [part for group in groups for part in _parts(group)]
    if kind == "adamw":
        return torch.optim.AdamW(parts, fused=True)
    return _adamw_8bit()(parts)


def learning_rates(
    optimizer: torch.optim.Optimizer, groups: Sequence[Group], step: int, total_steps: int
) -> dict[str, float]:
    """Set the learning rates of a step (counted from 0) and return them by group.

    They rise linearly during the warm-up, then decay by the group's schedule. They depend on the step alone, so a
    checkpoint needs no state of a scheduler.
    """
    factors = {group.name: _factor(group.config, step, total_steps) for group in groups}
    rates = {}
    for part in optimizer.param_groups:
        name = part["name"]
        rates[name] = rate = part["initial_lr"] * factors[name]
        if isinstance(part["lr"], Tensor):  # torchao refuses a number, which would be compiled in
            part["lr"].fill_(rate)
        else:
            part["lr"] = rate
    return rates


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}


def _factor(config: GroupConfig, step: int, total_steps: int) -> float:
    """Return the factor of the group's learning rate at a step."""
    warmup = max(1, round(total_steps * config.warmup_ratio))
    progress = max(0.0, (step - warmup) / max(1, total_steps - warmup))
    return min(1.0, (step + 1) / warmup) * DECAYS[config.schedule](min(1.0, progress))


def _parts(group: Group) -> Iterator[dict[str, Any]]:
    """Yield the optimizer's groups: matrices with weight decay, then norms and biases without."""
    options = {"name": group.name, "lr": group.config.lr, "initial_lr": group.config.lr}
    decaying = [p for p in group.parameters.values() if p.ndim >= 2]
    others = [p for p in group.parameters.values() if p.ndim < 2]
    for params, decay in ((decaying, group.config.weight_decay), (others, 0.0)):
        if params:
            yield {"params": params, **options, "weight_decay": decay}


def _adamw_8bit() -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """Return TorchAO's AdamW8bit: of the libraries with 8-bit states, only TorchAO supports sharded parameters."""
    try:
        library = importlib.import_module("torchao.optim")
    except ImportError as error:
        raise UserError(
            "train.optimizer=adamw_8bit needs torchao: pip install 'spo-ray[low-memory]', or choose adamw"
        ) from error
    states: Any = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    states.implements(torch.ops.aten.clone.default)(_copied_state)
    states.implements(torch.ops.aten.new_empty.default)(_empty_state)
    compiler: Any = importlib.import_module("torch._functorch.config")
    # its cache on disk does not tell uneven shards of a parameter apart: a rank would get another rank's code
    compiler.enable_autograd_cache = False
    return library.AdamW8bit


def _copied_state(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Copy an 8-bit state; TorchAO can't, and an asynchronous checkpoint starts with a copy."""
    state = args[0]
    return type(state)(state.codes.clone(), state.scale.clone(), state.qmap, state.signed, state.dtype)


def _empty_state(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Allocate an 8-bit state like another one; PyTorch's own copies need it."""
    state, size = args[:2]
    codes = state.codes.new_empty(size, **kwargs)
    scale = state.scale.new_empty(state.scale.shape, **kwargs)
    return type(state)(codes, scale, state.qmap.to(codes.device), state.signed, state.dtype)
