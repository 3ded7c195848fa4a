"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

Group = tuple[Sequence[Tensor], float]
"""(parameters, learning rate)."""


def make_optimizer(groups: Iterable[Group], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with one learning rate for each group (equations 12 to 14)."""
    return torch.optim.AdamW(
        [{"params": list(p), "lr": lr} for p, lr in groups if p], weight_decay=weight_decay, fused=True
    )


def make_schedule(optimizer: torch.optim.Optimizer, kind: str, total_steps: int, warmup_ratio: float) -> LambdaLR:
    """Linear warm-up, then the decay of the given kind to 0 (``constant``: none)."""
    warmup = max(1, round(total_steps * warmup_ratio))
    decay = DECAYS[kind]

    def factor(step: int) -> float:
        progress = max(0.0, (step - warmup) / max(1, total_steps - warmup))
        return min(1.0, (step + 1) / warmup) * decay(min(1.0, progress))

    return LambdaLR(optimizer, factor)


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
