"""Starting or joining a Ray cluster, and refusing plans that it cannot hold."""

import logging
import os
import socket
from typing import Any

import ray
import ray.data

from spo_ray.config import Config
from spo_ray.data_config import EngineConfig, TeacherModel
from spo_ray.errors import UserError
from spo_ray.run import say

LOCAL_CPUS = 4
"""Logical CPUs of a local cluster at least: actors that hold one each must leave some for Ray Data's tasks."""
DATA_TASK_CPUS = 1.0
REACH_S = 10.0
"""How long to wait for an answer from a cluster's address."""


def connect(config: Config) -> None:
    """Join ``ray.address`` or ``RAY_ADDRESS``, else start a local cluster; then check the plan.

    Raises:
        UserError: no cluster at the address, or too few resources; without this, Ray would wait for ever.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what Ray's C++ prints to the terminal
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": config.ray.worker_logs}
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as error:
            raise UserError(f"no Ray cluster at {address}: start one, or unset ray.address and RAY_ADDRESS") from error
    else:
        cpus = config.ray.num_cpus or max(LOCAL_CPUS, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    check_plan(config, nodes)
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    say("ray", f"{'joined' if address else 'started'} a cluster: {len(nodes)} nodes, {cpus:g} CPUs, {gpus:g} GPUs")


def check_plan(config: Config, nodes: list[dict[str, Any]]) -> None:
    """Compare what the stages hold at once with the cluster's logical resources.

    Raises:
        UserError: naming the stage, what it needs, what there is, and the settings to change.
    """
    engine, train = config.engine, config.train
    has_gpus = any(node.get("GPU") for node in nodes)
    workers = train.num_workers * min(train.parallel_methods, len(config.methods))
    gpu = float(has_gpus if train.use_gpu is None else train.use_gpu)
    engine_gpu = float(has_gpus) if engine.gpus is None else engine.gpus
    plans = [
        ("sampling", engine.replicas, engine.cpus, engine_gpu, DATA_TASK_CPUS, "engine.replicas, engine.cpus"),
        *(
            (
                "a teacher",
                own.replicas,
                own.cpus,
                float(has_gpus) if own.gpus is None else own.gpus,
                DATA_TASK_CPUS,
                "the engine of sft_data.teachers",
            )
            for own in (teacher.engine for teacher in config.sft_data.teachers if isinstance(teacher, TeacherModel))
            if isinstance(own, EngineConfig)
        ),
        ("training", workers, train.cpus_per_worker, gpu, 0.0, "train.num_workers, train.parallel_methods"),
        ("reference", train.num_workers, train.cpus_per_worker, gpu, DATA_TASK_CPUS, "train.num_workers"),
    ]
    for stage, count, cpus, gpus, extra, settings in plans:
        slots = sum(_slots(node, cpus, gpus) for node in nodes)
        total = sum(node.get("CPU", 0.0) for node in nodes)
        if slots < count or total < count * cpus + extra:
            raise UserError(
                f"too few resources: {stage} needs {count} actors of {cpus:g} CPUs and {gpus:g} GPUs"
                f"{f' and {extra:g} CPU for data tasks' if extra else ''}, the cluster has {total:g} CPUs and "
                f"{sum(node.get('GPU', 0.0) for node in nodes):g} GPUs: lower {settings}, raise ray.num_cpus on a "
                "local cluster, or add nodes"
            )


def engine_gpus(engine: EngineConfig) -> float:
    """GPUs per engine on the connected cluster."""
    return float(_has_gpus()) if engine.gpus is None else engine.gpus


def uses_gpu(config: Config) -> bool:
    """Whether training workers get a GPU each on the connected cluster."""
    return _has_gpus() if config.train.use_gpu is None else config.train.use_gpu


def _has_gpus() -> bool:
    return bool(ray.cluster_resources().get("GPU"))


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes before it gives up on an address."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto", "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise UserError(f"no Ray cluster at {address}: start one, or unset ray.address and RAY_ADDRESS") from error


def _slots(node: dict[str, Any], cpus: float, gpus: float) -> int:
    by_gpu = int(node.get("GPU", 0.0) / gpus) if gpus else 10**9
    return min(int(node.get("CPU", 0.0) / cpus), by_gpu)
