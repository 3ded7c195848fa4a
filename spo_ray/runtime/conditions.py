"""What the time of a stage depends on, beside its rows: recorded with it, and compared by plans."""

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

from spo_ray.config.methods import Spo
from spo_ray.config.schema import Config


def conditions(config: Config, trains: str | None, actors: int, cpus: float) -> dict[str, Any]:
    """Return model, data, precision, lengths, processes and hardware of a stage, as JSON.

    Args:
        config: configuration of the run.
        trains: ``sft``, the method that is trained, or None.
        actors: processes that work at the same time.
        cpus: CPUs of each.
    """
    engine, method = config.engine, config.methods.get(trains or "")
    kind: list[Any] = [method.type if method else trains]
    if isinstance(method, Spo):
        kind += [method.base.type, method.inner.steps, method.inner.every, method.gamma > 0]
    return {
        "model": config.model.path,
        "theta": config.model.theta.type,
        "data": str(getattr(config.data, "path", config.data.type)),
        "trains": kind,
        "precision": config.train.precision if trains else engine.dtype,
        "length": config.train.max_length if trains else [engine.max_model_len, config.eval.max_tokens],
        "samples": None if trains else [config.sampling.samples, config.sampling.max_tokens, len(config.eval.seeds)],
        "checkpointing": config.train.gradient_checkpointing if trains else None,
        "processes": [actors, cpus],
        "hardware": hardware(),
    }


@cache
def hardware() -> str:
    """Return the processor's architecture and cores, and the names of NVIDIA's GPUs, of this machine."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [line.partition(":")[2].strip() for card in cards for line in card.read_text().splitlines()[:1]]
    return ", ".join([f"{platform.machine()}, {os.cpu_count()} cores", *names])
