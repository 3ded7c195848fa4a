"""Checkpoints within training: what a run needs to go on as if it had never stopped.

PyTorch's distributed checkpoint (DCP) has parameters, optimizer states and random number generators, each rank its
shards, so that any number of ranks can go on from it; ``state.json`` has the rest. A checkpoint counts once Ray Train
has registered it, which it does when all ranks' files are in the storage: what a crash leaves besides is ignored.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from spo_ray.config.train import CheckpointConfig
from spo_ray.core.losses import Metrics
from spo_ray.errors import TrainingError
from spo_ray.train.distributed import Distributed

STATE = "state.json"
Extra = dict[str, Any]
"""What is not a tensor: JSON."""


class Checkpointer:
    """A job's checkpoints in its Ray Train run; jobs one after another share a run."""

    def __init__(self, job: str, config: CheckpointConfig, rank: Distributed, timeout_s: float = 1800.0) -> None:
        self.job, self.config, self.rank = job, config, rank
        # saving in the background must not get between the collectives of training
        limit = timedelta(seconds=timeout_s)
        self.group = dist.new_group(backend="gloo", timeout=limit) if config.every else None
        self.pending = 0

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Extra:
        """Load the job's newest checkpoint; gives its ``state.json``, empty without any."""
        checkpoint = ray.train.get_checkpoint()
        return self.load(checkpoint, model, optimizer) if checkpoint else {}

    def load(self, checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Extra:
        """Load one checkpoint, if it is this job's."""
        with checkpoint.as_directory() as folder:
            extra = json.loads((Path(folder) / STATE).read_text())
            if extra["job"] != self.job:
                return {}
            load_tensors(folder, model, optimizer, self.rank)
        return extra

    def due(self, step: int, total: int) -> bool:
        """Whether a checkpoint belongs behind this step; behind the last one only to be compared with others."""
        every = self.config.every
        return bool(every) and (step % every == 0 if step < total else self.config.best is not None)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Extra, record: Metrics) -> None:
        """Checkpoint the state behind a step. Training goes on as soon as the state is copied, if so configured.

        Raises:
            TrainingError: it could not be written (asynchronously: raised out of the training loop as soon as known).
        """
        self.wait()
        tensors = collect(model, optimizer, self.rank)
        extra = extra | {"job": self.job}
        name = f"{self.job}_step_{extra['step']:08d}"
        score = self._score(record)
        mode = CheckpointUploadMode.ASYNC if self.config.asynchronous else CheckpointUploadMode.SYNC
        self.pending += 1
        folder = tempfile.mkdtemp(prefix="spo_ray_")
        ray.train.report(
            {"job": self.job, "step": extra["step"]} | score,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=lambda local, name: self._write(local, name, tensors, extra),
        )

    def wait(self) -> None:
        """Until the checkpoint under way is written."""
        while self.pending:
            time.sleep(0.005)

    def best(self) -> Checkpoint | None:
        """The best of this job's checkpoints that are kept; None unless that is configured."""
        if self.config.best is None or not self.config.every:
            return None
        self.wait()
        own = [c for c in ray.train.get_all_reported_checkpoints() if c.metrics.get("job") == self.job]
        return max(own, key=lambda reported: reported.metrics["score"]).checkpoint if own else None

    def _write(self, local: Checkpoint, name: str, tensors: Mapping[str, Any], extra: Extra) -> Checkpoint:
        storage = ray.train.get_context().get_storage()
        try:
            write_tensors(local.path, tensors, self.group)
            if self.rank.index == 0:
                (Path(local.path) / STATE).write_text(json.dumps(extra))
            return storage.persist_current_checkpoint(local, name)
        except Exception as error:
            raise TrainingError(
                f"the checkpoint {name} could not be written to {storage.experiment_fs_path}: {error}: the one before "
                "is as it was; free some space there, or set train.checkpoint.storage"
            ) from error
        finally:
            shutil.rmtree(local.path, ignore_errors=True)
            self.pending -= 1

    def _score(self, record: Metrics) -> dict[str, float]:
        best = self.config.best
        if best is None:
            return {}
        if best.metric not in record:
            raise TrainingError(
                f"train.checkpoint.best.metric={best.metric} is not in the log at step {record['step']:g}: choose one "
                f"of {', '.join(sorted(record))}, or a train.checkpoint.every at whose steps it is measured"
            )
        return {"score": record[best.metric] * (1.0 if best.mode == "max" else -1.0)}


class NoSnapshots(Checkpointer):
    """For processes without Ray Train: nothing is kept."""

    def __init__(self, rank: Distributed) -> None:
        super().__init__("", CheckpointConfig(every=None), rank)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Extra:
        """Nothing."""
        return {}


def collect(model: nn.Module, optimizer: torch.optim.Optimizer, rank: Distributed) -> dict[str, Any]:
    """A copy in main memory of this rank's tensors, which later steps do not touch."""
    on_cpu = rank.device.type == "cpu"
    state = _tensors(model, optimizer, StateDictOptions(cpu_offload=not on_cpu))
    generators = {f"cpu.{rank.index}": torch.get_rng_state()}
    if not on_cpu:
        generators[f"cuda.{rank.index}"] = torch.cuda.get_rng_state(rank.device)
    return _map(lambda tensor: tensor.detach().clone(), state | {"generators": generators})


def write_tensors(folder: str, tensors: Mapping[str, Any], group: Any = None) -> None:
    """One rank's part of a checkpoint; a collective of ``group``."""
    dcp.save(dict(tensors), storage_writer=FileSystemWriter(folder), process_group=group)


def load_tensors(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer | None, rank: Distributed) -> None:
    """Load parameters and, unless None, optimizer states; random generators too, where as many ranks saved them."""
    reader = dcp.FileSystemReader(folder)
    known = reader.read_metadata().state_dict_metadata
    state = _tensors(model, optimizer, StateDictOptions())
    generators = {"cpu": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state()} if rank.device.type == "cuda" else {}
    )
    same = f"generators.cpu.{rank.size}" not in known and f"generators.cpu.{rank.size - 1}" in known
    if same:
        state["generators"] = {f"{kind}.{rank.index}": value for kind, value in generators.items()}
    dcp.load(state, storage_reader=reader)
    if optimizer is None:
        set_model_state_dict(model, state["model"])
    else:
        states = {"state": state["optimizer"], "param_groups": get_state_dict(model, optimizer)[1]["param_groups"]}
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=states)
    if same:
        torch.set_rng_state(state["generators"][f"cpu.{rank.index}"])
        if rank.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"][f"cuda.{rank.index}"])


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None, options: StateDictOptions) -> dict[str, Any]:
    """Parameters and optimizer states by the parameters' names. Learning rates follow from the step."""
    if optimizer is None:
        return {"model": get_model_state_dict(model, options=options)}
    parameters, states = get_state_dict(model, optimizer, options=options)
    return {"model": parameters, "optimizer": states["state"]}


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _map(function, value) for key, value in tree.items()}
    return function(tree) if isinstance(tree, Tensor) else tree
