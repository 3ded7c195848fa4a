"""Connects to a Ray cluster, and refuses plans that are too large for it."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import ceil
from threading import Timer
from typing import Any

import ray.data
from ray._private import auto_init_hook, worker

from spo_ray.config.data import EndpointConfig, EngineConfig
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.runtime.console import LOGGER, log, redact, warn
from spo_ray.runtime.failure import TOO_SLOW
from spo_ray.runtime.run import PlannedStage, Work

LOCAL_CPUS = 4
"""Minimum of logical CPUs of a local cluster: beside actors, Ray Data needs some for its tasks."""
DATA_TASK_CPUS = 1.0
"""CPUs of Ray Data's tasks beside actors."""
REPEATED: dict[str, Any] = {"max_restarts": 3, "max_task_retries": 3}
"""Options of actors that Ray starts again if they die, and whose calls it repeats: not for ever."""
GCS_WAIT = "RAY_gcs_server_port_wait_time_s"
"""Environment variable of Ray's limit for the start of its GCS, in seconds."""
SLOW_START_S = 30.0
"""Seconds until the start of a local cluster is called slow."""
REACH_S = 10.0
"""Timeout in seconds for connecting to a cluster's address."""


def connect(config: Config, planned: Sequence[PlannedStage] = ()) -> None:
    """Join the cluster at ``ray.address`` or ``RAY_ADDRESS``, else start a local one; check that the plan fits on it.

    Raises:
        UserError: no cluster at the address, or too few resources, for which Ray would wait forever.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # output of Ray's C++ code
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if not config.ray.worker_logs:  # the raylet's warnings would be printed all the same
        worker.print_to_stdstream = lambda data, **_: LOGGER.debug("%s", data["lines"])  # ty: ignore[invalid-assignment]
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": config.ray.worker_logs}
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
        try:
            ray.init(address=address, runtime_env={"env_vars": passed_env(config)}, **quiet)
        except (ConnectionError, ValueError) as error:  # the latter if it is no address
            raise UserError(f"no Ray cluster at {address}: start one, or unset ray.address and RAY_ADDRESS") from error
    else:
        cpus = config.ray.num_cpus or max(LOCAL_CPUS, os.cpu_count() or 1)
        start_local(config.ray.start_timeout_s, num_cpus=cpus, include_dashboard=False, **quiet)
    auto_init_hook.enable_auto_connect = False  # else a thread that outlives the cluster starts or joins another one
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are on the failure card
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    check_resources(planned, nodes)
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    size = f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}, {cpus:g} CPUs, {gpus:g} GPUs"
    log("ray", f"joined a cluster: {size}" if address else f"started a local cluster: {size}")


def start_local(limit: float, **options: Any) -> None:
    """Start a local cluster; on a busy machine that may take ``limit`` seconds instead of Ray's 30.

    Ray's raylet ends itself if another process is not there after 15 seconds, which no setting changes: it is tried
    again and again.
    """
    os.environ.setdefault(GCS_WAIT, str(ceil(limit)))
    slow = f"the machine is busy: no cluster after {SLOW_START_S:g} s; waiting for ray.start_timeout_s={limit:g}"
    reminder = Timer(SLOW_START_S, warn, ("ray", slow))
    reminder.daemon = True
    reminder.start()
    end = time.monotonic() + limit
    try:
        while True:
            try:
                ray.init(address="local", **options)
                return
            except Exception as error:
                if TOO_SLOW not in str(error) or time.monotonic() > end:
                    raise
                ray.shutdown()
    finally:
        reminder.cancel()


def passed_env(config: Config) -> dict[str, str]:
    """Return the variables in ``ray.pass_env``, without those that the description of a submitted job has already.

    Raises:
        UserError: a value contains a password, which Ray would show in the job's description.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars", {})
    found = {name: os.environ[name] for name in config.ray.pass_env if name in os.environ and name not in given}
    for name, value in found.items():
        if redact(value) != value:
            raise UserError(f"{name} holds a password: take it out of ray.pass_env, and set it on the nodes instead")
    return found


def check_resources(
    planned: Sequence[PlannedStage], nodes: Sequence[Mapping[str, Any]], has_gpus: bool | None = None
) -> None:
    """Check that the actors of each planned stage fit on the nodes at the same time, by logical resources.

    ``has_gpus`` is True if stages use GPUs by default; None: if a node has any.

    Raises:
        UserError: a stage does not fit; the message has its needs, the resources and the settings to change.
    """
    has_gpus = any(node.get("GPU") for node in nodes) if has_gpus is None else has_gpus
    total = sum(node.get("CPU", 0.0) for node in nodes)
    for stage in planned:
        work = stage.work
        if stage.state == "reused" or not work.actors:
            continue
        gpus = float(has_gpus) if work.gpus is None else work.gpus
        extra = 0.0 if work.trains else DATA_TASK_CPUS
        slots = sum(_slots(node, work.cpus, gpus) for node in nodes)
        if slots < work.actors or total < work.actors * work.cpus + extra:
            raise UserError(
                f"too few resources: {stage.name} needs {work.actors} actors of {work.cpus:g} CPUs and {gpus:g} GPUs"
                f"{f' and {extra:g} CPU for data tasks' if extra else ''}, the cluster has {total:g} CPUs and "
                f"{sum(node.get('GPU', 0.0) for node in nodes):g} GPUs: lower {work.settings}, raise ray.num_cpus on a "
                "local cluster, or add nodes"
            )


def room_beside(planned: Sequence[PlannedStage], engine: EngineConfig) -> str | None:
    """Return the id of a node on which one more engine fits beside every planned stage, or None."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [dict(node["Resources"]) for node in alive]
    for number, node in enumerate(nodes):
        left = {"CPU": node.get("CPU", 0.0) - engine.cpus, "GPU": node.get("GPU", 0.0) - engine_gpus(engine)}
        if min(left.values()) >= 0:
            with suppress(UserError):
                check_resources(planned, [*nodes[:number], node | left, *nodes[number + 1 :]], has_gpus=_has_gpus())
                return alive[number]["NodeID"]
    return None


def engine_work(engine: EngineConfig | EndpointConfig, settings: str, note: str, **bounds: Any) -> Work:
    """Return the work of a stage that uses engines or an endpoint; ``bounds`` are ``rows``, ``out`` and ``tokens``.

    Tokens are generated unless ``generates=False`` is among the bounds.
    """
    bounds = {"generates": True} | bounds
    if isinstance(engine, EndpointConfig):
        return Work(note=f"{note}, {engine.concurrency} requests at a time to {engine.url}", **bounds)
    held: dict[str, Any] = {"actors": engine.replicas, "cpus": engine.cpus, "gpus": engine.gpus}
    return Work(settings=settings, note=note, **held, **bounds)


def worker_work(config: Config, note: str, groups: int = 1, trains: str | None = None, **bounds: Any) -> Work:
    """Return the work of a stage on groups of training workers; ``bounds`` are ``rows`` and ``tokens``.

    This is for plans and the resource check; ``train/launch.py`` starts the workers.
    """
    train = config.train
    held: dict[str, Any] = {"actors": train.num_workers * groups, "cpus": train.cpus_per_worker}
    held["gpus"] = None if train.use_gpu is None else float(train.use_gpu)
    settings = "train.num_workers" if groups == 1 else "train.num_workers, train.parallel_methods"
    return Work(trains=trains, settings=settings, note=note, **held, **bounds)


def engine_gpus(engine: EngineConfig, has_gpus: bool | None = None) -> float:
    """Return the GPUs of each engine; ``has_gpus`` None: on the connected cluster."""
    return float(_has_gpus() if has_gpus is None else has_gpus) if engine.gpus is None else engine.gpus


def uses_gpu(config: Config, has_gpus: bool | None = None) -> bool:
    """Return True if each training worker gets a GPU; ``has_gpus`` None: on the connected cluster."""
    return (_has_gpus() if has_gpus is None else has_gpus) if config.train.use_gpu is None else config.train.use_gpu


def _has_gpus() -> bool:
    return ray.is_initialized() and bool(ray.cluster_resources().get("GPU"))


def _check_reachable(address: str) -> None:
    """Raise a UserError if nothing answers at an address; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto", "local"
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise UserError(f"no Ray cluster at {address}: start one, or unset ray.address and RAY_ADDRESS") from error


def _slots(node: Mapping[str, Any], cpus: float, gpus: float) -> int:
    by_gpu = int(node.get("GPU", 0.0) / gpus) if gpus else 10**9
    return min(int(node.get("CPU", 0.0) / cpus), by_gpu)
