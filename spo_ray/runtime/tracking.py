"""TensorBoard, Weights & Biases and MLflow; they show the same metrics as ``log.jsonl``.

The driver (in a sweep the process of each trial) passes on the metrics that it reads in the logs. Credentials come from
that process's environment (``WANDB_API_KEY``, ``MLFLOW_TRACKING_TOKEN``), never from the configuration.
"""

import hashlib
import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from spo_ray.config.keys import leaves
from spo_ray.config.schema import Config
from spo_ray.errors import UserError, first_line
from spo_ray.runtime.console import warn
from spo_ray.runtime.run import Run

PROJECT = "spo-ray"
"""Weights & Biases' project and MLflow's experiment where the environment names none."""
INSTALL = "pip install 'spo-ray[tracking]'"
Metrics = Mapping[str, float]


class Tracker(NamedTuple):
    """One training's connection to a tracking library."""

    log: Callable[[int, Metrics], object]
    """Logs the metrics of a step; steps come in ascending order."""
    close: Callable[[], object]


def tensorboard(run: Run, stage: str, key: str, step: int) -> Tracker:
    """Write event files into the folder ``tensorboard/STAGE`` of the run."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.root / "tensorboard" / stage), purge_step=step)

    def log(step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def wandb(run: Run, stage: str, key: str, step: int) -> Tracker:
    """Open a Weights & Biases run, grouped under the run's name; offline with ``WANDB_MODE=offline``."""
    import wandb

    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        group=run.config.name,
        name=f"{run.config.name}/{stage}",
        id=_identifier(run, key),
        resume="allow",
        dir=str(run.root),
        config=run.config.model_dump(mode="json"),
        reinit="create_new",
        settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True),
    )
    return Tracker(lambda step, metrics: opened.log(dict(metrics), step=step), opened.finish)


def mlflow(run: Run, stage: str, key: str, step: int) -> Tracker:
    """Open an MLflow run; the server is ``MLFLOW_TRACKING_URI``."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, name = MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    tags = {"training": _identifier(run, key), "run": run.config.name, "stage": stage}
    runs = client.search_runs([experiment], f"tags.training = '{tags['training']}'")
    newest = -1  # step that the server has already; MLflow would store a repeated step twice
    if runs:
        identifier = runs[0].info.run_id
        newest = max((m.step for m in client.get_metric_history(identifier, "total_steps")), default=-1)
        client.update_run(identifier, status="RUNNING")
    else:
        identifier = client.create_run(experiment, tags=tags, run_name=f"{run.config.name}/{stage}").info.run_id
        parameters = [Param(name, str(value)[:500]) for name, value in _parameters(run.config, stage)]
        client.log_batch(identifier, params=parameters[:100])

    def log(step: int, metrics: Metrics) -> None:
        if step > newest:
            now = int(time.time() * 1000)
            client.log_batch(identifier, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    return Tracker(log, partial(client.set_terminated, identifier))


TRACKERS: dict[str, Callable[[Run, str, str, int], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
}
"""Functions that open a tracker, by the name in ``tracking``, which is also the library's name."""


class TrackerGroup:
    """All trackers of one training. A tracker that raises is left out from then on; the training continues."""

    def __init__(self, run: Run, stage: str, key: str, step: int) -> None:
        self.stage = stage
        self.trackers: dict[str, Tracker] = {}
        for name in run.config.tracking:
            self._attempt(name, lambda n=name: self.trackers.update({n: TRACKERS[n](run, stage, key, step)}))

    def log(self, step: int, metrics: Metrics) -> None:
        """Log the metrics of a step to each tracker."""
        for name, tracker in list(self.trackers.items()):
            self._attempt(name, partial(tracker.log, step, metrics))

    def close(self) -> None:
        """Close each tracker."""
        for name, tracker in list(self.trackers.items()):
            self._attempt(name, tracker.close)

    def _attempt(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self.trackers.pop(name, None)
            warn(self.stage, f"the tracker {name} is off from here on: {type(error).__name__}: {first_line(error)}")


class Trackers:
    """Opens the configured trackers for the trainings of a run."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def open(self, stage: str, key: str, step: int) -> TrackerGroup:
        """Return the trackers of a training that starts or resumes at ``step``; ``key`` identifies it in each."""
        return TrackerGroup(self.run, stage, key, step)


def check_trackers(names: Sequence[str]) -> None:
    """Import the libraries of the configured trackers, before anything that takes long.

    Raises:
        UserError: a library is missing; the message names it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"tracking={list(names)} needs {name}, which can't be imported: {INSTALL}") from error


def _identifier(run: Run, key: str) -> str:
    return hashlib.sha256(f"{run.root} {key}".encode()).hexdigest()[:16]


def _parameters(config: Config, stage: str) -> list[tuple[str, Any]]:
    """Return the settings that a training depends on, by dotted keys."""
    method = config.methods.get(stage.removeprefix("method_"))
    tree = config.model_dump(mode="json", include={"seed": True, "model": {"path"}, "sft": True, "preference": True})
    return list(leaves(tree | ({"method": method.model_dump(mode="json")} if method else {})))
