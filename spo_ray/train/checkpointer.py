"""Checkpoints within a training, from which it resumes with the same results as an uninterrupted one.

PyTorch's distributed checkpoint (DCP) holds parameters, optimizer states and random generators, each rank's shards, so
that any number of ranks can resume; ``state.json`` holds :class:`Progress`. A checkpoint counts once Ray Train has
registered it, which it does when all ranks' files are in the storage. Incomplete files from a crash are ignored.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
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
from spo_ray.train.spec import text_of

STATE = "state.json"


@dataclass
class Progress:
    """Progress of a training: the part of a checkpoint that is JSON, not tensors."""

    step: int = 0
    """Last finished step; 0 before the first."""
    skipped: int = 0
    """Steps skipped so far because their gradient was not finite."""
    in_a_row: int = 0
    """Steps skipped in a row up to this one."""
    wall_s: float = 0.0
    """Seconds of training so far, over all starts."""
    ended: bool = False
    """True if a callback ended the training at this step."""
    remembered: list[dict[str, Any]] = field(default_factory=list)
    """State of each callback, in the order of the callbacks."""


class Checkpointer:
    """Saves and loads the checkpoints of one job. The jobs of a group share one Ray Train run.

    If ``config.every`` is None it does nothing, and needs no Ray Train. ``limited`` makes a context that ends the
    process if its block takes too long: each step, saving, and waiting for a checkpoint.
    """

    def __init__(
        self,
        job: str,
        config: CheckpointConfig,
        rank: Distributed,
        timeout_s: float = 1800.0,
        limited: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.job, self.config, self.rank, self.limited = job, config, rank, limited
        # a group of its own: saving in the background must not mix with the collectives of training
        limit = timedelta(seconds=timeout_s)
        self.group = dist.new_group(backend="gloo", timeout=limit) if config.every else None
        self.pending = 0
        self.left_out = 0
        """Number of this job's damaged checkpoints, by which the names of later ones differ from theirs."""

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        damaged: Collection[str],
        unread: Callable[[str, str], None],
    ) -> Progress | None:
        """Load the newest checkpoint of this job that is not damaged and return its progress; None without one.

        Those named in ``damaged`` are left out. ``unread`` is called on rank 0 with the name of each other one that
        is, and the reason. Collective.

        Raises:
            OSError: the storage can't be reached.
            RuntimeError: all are damaged. The parameters may be too: training begins in another process.
        """
        found = self._own() if self.config.every and ray.train.get_checkpoint() else []
        self.left_out = len(damaged)
        own = [reported for reported in found if Path(reported.checkpoint.path).name not in damaged]
        for reported in sorted(own, key=lambda reported: reported.metrics["step"], reverse=True):
            progress, reason = None, ""
            try:
                progress = self._load(reported.checkpoint, model, optimizer)
            except (Exception, CheckpointException) as error:  # whatever a damaged file leads to
                inner = isinstance(error, CheckpointException)
                cause = next(iter(error.failures.values()))[0] if inner else error
                if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                    raise cause from error
                reason = text_of(cause)
            reasons = list(filter(None, self.rank.gather([reason])))
            if not reasons:
                return progress
            self.left_out += 1
            if self.rank.index == 0:
                unread(Path(reported.checkpoint.path).name, reasons[0])
        if own:
            raise RuntimeError("no checkpoint can be read: training begins at step 0")
        return None

    def _own(self) -> list[Any]:
        """Return the checkpoints of this job that are kept."""
        return [c for c in ray.train.get_all_reported_checkpoints() if c.metrics.get("job") == self.job]

    def restore_best(self, model: nn.Module) -> int | None:
        """Load the parameters of the best kept checkpoint and return its step; None unless ``best`` is configured.

        Collective: call on all ranks.
        """
        if self.config.best is None or not self.config.every:
            return None
        self.wait()
        own = self._own()
        if not own:
            return None
        best = max(own, key=lambda reported: reported.metrics["score"])
        return self._load(best.checkpoint, model, None).step

    def due(self, step: int, total: int) -> bool:
        """Return True if a checkpoint follows this step; after the last step only if the best one is chosen."""
        every = self.config.every
        return bool(every) and (step % every == 0 if step < total else self.config.best is not None)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, record: Metrics) -> None:
        """Save a checkpoint after a step; if ``asynchronous``, return as soon as the state is copied. Collective.

        Raises:
            TrainingError: the checkpoint can't be written. If asynchronous, the training loop raises it later.
        """
        self.wait()
        tensors = collect(model, optimizer, self.rank)
        state = asdict(progress)
        metrics = {"job": self.job, "step": progress.step} | self._score(record)
        mode = CheckpointUploadMode.ASYNC if self.config.asynchronous else CheckpointUploadMode.SYNC
        self.pending += 1
        with self.limited():
            ray.train.report(
                metrics,
                checkpoint=Checkpoint.from_directory(tempfile.mkdtemp(prefix="spo_ray_")),
                checkpoint_dir_name=f"{self.job}_step_{progress.step:08d}"
                + (f"_{self.left_out}" if self.left_out else ""),
                checkpoint_upload_mode=mode,
                checkpoint_upload_fn=lambda local, name: self._write(local, name, tensors, state),
            )

    def wait(self) -> None:
        """Wait until the pending checkpoint is written.

        Where there is no memory for another thread, Python can wait for its start for ever: hence the limit.
        """
        with self.limited():
            while self.pending:
                time.sleep(0.005)

    def _load(self, checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Progress:
        with checkpoint.as_directory() as folder:
            state = json.loads((Path(folder) / STATE).read_text())
            load_tensors(folder, model, optimizer, self.rank)
        return Progress(**state)

    def _write(self, local: Checkpoint, name: str, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> Checkpoint:
        storage = ray.train.get_context().get_storage()
        try:
            dcp.save(dict(tensors), storage_writer=FileSystemWriter(local.path), process_group=self.group)
            if self.rank.index == 0:
                (Path(local.path) / STATE).write_text(json.dumps(state))
            return storage.persist_current_checkpoint(local, name)
        except (Exception, CheckpointException) as error:
            raise TrainingError(
                f"the checkpoint {name} could not be written to {storage.experiment_fs_path}: {error}. The previous "
                "checkpoint is intact: free some space there, or set train.checkpoint.storage"
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


def collect(model: nn.Module, optimizer: torch.optim.Optimizer, rank: Distributed) -> dict[str, Any]:
    """Copy this rank's tensors to main memory, so that later steps do not change them."""
    state = _tensors(model, optimizer, StateDictOptions(cpu_offload=rank.device.type != "cpu"))
    return _map(lambda tensor: tensor.detach().clone(), state | {"generators": _random_states(rank)})


def load_tensors(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer | None, rank: Distributed) -> None:
    """Load parameters and, unless ``optimizer`` is None, optimizer states. Collective: call on all ranks.

    The states of the random generators are loaded too if the same number of ranks saved them.
    """
    reader = dcp.FileSystemReader(folder)
    known = reader.read_metadata().state_dict_metadata
    state = _tensors(model, optimizer, StateDictOptions())
    if f"generators.cpu.{rank.size}" not in known and f"generators.cpu.{rank.size - 1}" in known:
        state["generators"] = _random_states(rank)
    dcp.load(state, storage_reader=reader)
    if optimizer is None:
        set_model_state_dict(model, state["model"])
    else:
        states = {"state": state["optimizer"], "param_groups": get_state_dict(model, optimizer)[1]["param_groups"]}
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=states)
    for name, value in state.get("generators", {}).items():
        if name.startswith("cpu"):
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, rank.device)


def _random_states(rank: Distributed) -> dict[str, Tensor]:
    """Return the states of this rank's random generators, under names that differ between ranks."""
    states = {f"cpu.{rank.index}": torch.get_rng_state()}
    if rank.device.type != "cpu":
        states[f"cuda.{rank.index}"] = torch.cuda.get_rng_state(rank.device)
    return states


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None, options: StateDictOptions) -> dict[str, Any]:
    """Return parameters and optimizer states by the parameters' names. Learning rates follow from the step."""
    if optimizer is None:
        return {"model": get_model_state_dict(model, options=options)}
    parameters, states = get_state_dict(model, optimizer, options=options)
    return {"model": parameters, "optimizer": states["state"]}


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _map(function, value) for key, value in tree.items()}
    return function(tree) if isinstance(tree, Tensor) else tree
