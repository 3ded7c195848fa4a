"""TensorBoard, Weights & Biases and MLflow, through their own libraries; ``log.jsonl`` has the same in any case.

The driver, in a sweep each trial's process, writes to them what it reads in the logs. Credentials come from that
process's environment (``WANDB_API_KEY``, ``MLFLOW_TRACKING_TOKEN``), never from the configuration.
"""

import hashlib
import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.runtime.console import log
from spo_ray.runtime.run import Run

PROJECT = "spo-ray"
"""Weights & Biases' project and MLflow's experiment where the environment names none."""
INSTALL = "pip install 'spo-ray[tracking]'"
Metrics = Mapping[str, float]


class Tracker(Protocol):
    """One training's curves somewhere."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Metrics of a step; steps come in order."""
        ...

    def close(self) -> None:
        """All of it is there."""
        ...


class Trackers:
    """Opens the configured trackers for the trainings of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def open(self, stage: str, key: str, step: int) -> "Several":
        """Trackers of one training, that starts or goes on with ``step``; ``key`` names it for good."""
        wanted = {name: KINDS[name] for name in self.run.config.tracking}
        return Several(stage, {name: partial(kind, self.run, stage, key, step) for name, kind in wanted.items()})


class Several:
    """All of them. One that fails is left out from then on: a training must not end because nobody can watch it."""

    def __init__(self, stage: str, makers: Mapping[str, Callable[[], Tracker]]) -> None:
        self.stage = stage
        self.trackers: dict[str, Tracker] = {}
        for name, make in makers.items():
            self._attempt(name, lambda name=name, make=make: self.trackers.update({name: make()}))

    def log(self, step: int, metrics: Metrics) -> None:
        """Metrics of a step, to each."""
        for name, tracker in list(self.trackers.items()):
            self._attempt(name, partial(tracker.log, step, metrics))

    def close(self) -> None:
        """Close each."""
        for name, tracker in list(self.trackers.items()):
            self._attempt(name, tracker.close)

    def _attempt(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self.trackers.pop(name, None)
            text = str(error).splitlines()[0] if str(error) else ""
            log(self.stage, f"the tracker {name} is off from here on: {type(error).__name__}: {text}")


class TensorBoard:
    """Event files under ``tensorboard/STAGE`` in the run's folder."""

    def __init__(self, run: Run, stage: str, key: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.root / "tensorboard" / stage), purge_step=step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run per training, grouped under the run's name; offline with ``WANDB_MODE=offline``."""

    def __init__(self, run: Run, stage: str, key: str, step: int) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=run.config.name,
            name=f"{run.config.name}/{stage}",
            id=_identifier(run, key),
            resume="allow",
            dir=str(run.root),
            config=run.config.model_dump(mode="json"),
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True
            ),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """A run per training; the server is ``MLFLOW_TRACKING_URI``."""

    def __init__(self, run: Run, stage: str, key: str, step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.client, self.metric = MlflowClient(), Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self.client.create_experiment(name)
        identifier = _identifier(run, key)
        there = self.client.search_runs([where], f"tags.training = '{identifier}'")
        self.last = -1
        if there:  # what it has would be doubled
            self.id = there[0].info.run_id
            self.last = max((m.step for m in self.client.get_metric_history(self.id, "total_steps")), default=-1)
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {"training": identifier, "run": run.config.name, "stage": stage}
            self.id = self.client.create_run(where, tags=tags, run_name=f"{run.config.name}/{stage}").info.run_id
            parameters = [Param(name, str(value)[:500]) for name, value in _flat(run.config, stage)]
            self.client.log_batch(self.id, params=parameters[:100])

    def log(self, step: int, metrics: Metrics) -> None:
        if step <= self.last:
            return
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[self.metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        self.client.set_terminated(self.id)


KINDS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
"""By the name in the configuration, which is the library's name too."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose library is missing, before anything long.

    Raises:
        UserError: naming the library.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"tracking={list(names)} needs {name}, which can't be imported: {INSTALL}") from error


def _identifier(run: Run, key: str) -> str:
    return hashlib.sha256(f"{run.root} {key}".encode()).hexdigest()[:16]


def _flat(config: Config, stage: str) -> list[tuple[str, Any]]:
    """What a training depends on, in dotted keys."""
    name = stage.removeprefix("method_")
    parts: dict[str, Any] = {"seed": config.seed, "model": config.model.path}
    for section in ("sft", "preference"):
        parts |= {f"{section}.{key}": value for key, value in getattr(config, section).model_dump(mode="json").items()}
    method = config.methods.get(name)
    parts |= {f"method.{key}": value for key, value in (method.model_dump(mode="json") if method else {}).items()}
    return list(parts.items())
