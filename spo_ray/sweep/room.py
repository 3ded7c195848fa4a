"""How many trials a cluster has room for at a time."""

from typing import Any

from spo_ray.cluster import engine_gpus, uses_gpu
from spo_ray.config import Config
from spo_ray.errors import UserError
from spo_ray.sweep.shared import shared_values
from spo_ray.sweep.space import sweep_of
from spo_ray.sweep_config import LogUniform

DRIVER = {"memory": 2.0**26}
"""What a trial's own process asks for, which mostly waits: Ray Tune refuses nothing at all, and a part of a CPU here
and there leaves no node with a whole one for a worker."""


def trial_room(config: Config, nodes: list[dict[str, Any]]) -> int:
    """Trials at a time: as many as fit, at most ``max_concurrent``.

    Raises:
        UserError: none fits, or not all members of a population.
    """
    sweep, count = sweep_of(config), fitting_trials(config, nodes)
    room = min(count, sweep.max_concurrent or count)
    if sweep.scheduler.type == "pbt" and room < sweep.samples:
        raise UserError(
            f"scheduler pbt trains all sweep.samples={sweep.samples} members at a time, and there is room for {room} "
            "trials: lower sweep.samples, or use a larger cluster"
        )
    return room


def fitting_trials(config: Config, nodes: list[dict[str, Any]]) -> int:
    """Trials that fit beside the evaluation actors, by the nodes' logical resources.

    Raises:
        UserError: none does; it would wait for ever.
    """
    train, engine = config.train, config.engine
    has_gpus = any(node.get("GPU") for node in nodes)
    gpus, beside = float(uses_gpu(config, has_gpus)), engine_gpus(engine, has_gpus)
    free = [{"CPU": node.get("CPU", 0.0), "GPU": node.get("GPU", 0.0)} for node in nodes]
    placed = all(_take(free, engine.cpus, beside) is not None for _ in range(engine.replicas))
    count = 0
    while placed and _take_trial(free, config, gpus):
        count += 1
    if not count:
        total = sum(node.get("CPU", 0.0) for node in nodes)
        raise UserError(
            f"too few resources: a trial needs {train.num_workers} workers of {train.cpus_per_worker:g} CPUs and "
            f"{gpus:g} GPUs ({train.placement}), beside {engine.replicas} evaluation actors of "
            f"{engine.cpus:g} CPUs and {beside:g} GPUs; the cluster has {total:g} CPUs on {len(nodes)} nodes: "
            "lower train.num_workers or engine.replicas, raise ray.num_cpus on a local cluster, or add nodes"
        )
    return count


def _take_trial(free: list[dict[str, float]], config: Config, gpus: float) -> bool:
    """Room for one more trial, taken if there is."""
    train, kept = config.train, [dict(node) for node in free]
    used: list[int] = []
    for _ in range(train.num_workers):
        allowed = {"STRICT_PACK": used[:1] or None, "STRICT_SPREAD": [i for i in range(len(free)) if i not in used]}
        node = _take(free, train.cpus_per_worker, gpus, allowed.get(train.placement))
        if node is None:
            free[:] = kept
            return False
        used.append(node)
    if prepares_itself(config) and _take(free, _preparing(config), 0.0) is None:
        free[:] = kept
        return False
    return True


def _take(free: list[dict[str, float]], cpus: float, gpus: float, allowed: list[int] | None = None) -> int | None:
    """The roomiest node that has so much, less what is taken."""
    for i in sorted(allowed if allowed is not None else range(len(free)), key=lambda i: -free[i]["CPU"]):
        if free[i]["CPU"] >= cpus - 1e-9 and free[i]["GPU"] >= gpus - 1e-9:
            free[i]["CPU"] -= cpus
            free[i]["GPU"] -= gpus
            return i
    return None


def prepares_itself(config: Config) -> bool:
    """Whether trials have starts of their own, that can't be known before."""
    space = sweep_of(config).space
    return any(isinstance(space[key], LogUniform) for key in shared_values(space))


def _preparing(config: Config) -> float:
    """CPUs that a trial needs for its own start beyond those of its training."""
    train = config.train
    return max(0.0, config.engine.replicas * config.engine.cpus + 1.0 - train.num_workers * train.cpus_per_worker)
