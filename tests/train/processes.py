"""Training processes over Gloo without Ray: the same code, started by torch's own launcher."""

import json
import multiprocessing
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from spo_ray.config.load import load
from spo_ray.config.train import CheckpointConfig
from spo_ray.model.fsdp import whole_state
from spo_ray.runtime.artifact import Artifact
from spo_ray.train import worker
from spo_ray.train.checkpointer import STATE, Checkpointer, Progress, collect, load_tensors
from spo_ray.train.data_loader import RowTable
from spo_ray.train.distributed import Distributed
from spo_ray.train.spec import TrainJob

from ..conftest import ROOT


class FolderCheckpoints(Checkpointer):
    """Checkpoints in folders: restore from one, write one after a step."""

    def __init__(self, rank, read=None, write=None, at=None):
        super().__init__("job", CheckpointConfig(every=None), rank)
        self.read, self.write, self.at = read, write, at

    def restore(self, model, optimizer, damaged, unread):
        if self.read is None:
            return None
        load_tensors(str(self.read), model, optimizer, self.rank)
        return Progress(**json.loads((Path(self.read) / STATE).read_text()))

    def due(self, step, total):
        return step == self.at

    def save(self, model, optimizer, progress, record):
        dcp.save(collect(model, optimizer, self.rank), storage_writer=FileSystemWriter(str(self.write)))
        if self.rank.index == 0:
            (Path(self.write) / STATE).write_text(json.dumps(asdict(progress)))


def train(workers, rows, out, overrides, method=None, model="assets/toy_base", **checkpoints):
    """Train in some processes. Leaves the export, the log, and ``whole.pt``: the parameters as they were trained."""
    out.mkdir(parents=True, exist_ok=True)
    start = tempfile.mktemp(dir=out)
    arguments = (workers, start, rows, str(out), overrides, method, str(model), checkpoints)
    # Forks of a server that has made the imports: seconds each otherwise. (Forks of this process, which other tests may
    # have left with threads, could wait for a lock for ever.)
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(_process, arguments, nprocs=workers, start_method="forkserver")
    return torch.load(out / "whole.pt", weights_only=True)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _process(index, size, start, rows, out, overrides, method, model, checkpoints):
    import os

    os.chdir(ROOT)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{start}", rank=index, world_size=size)
    rank = Distributed(index, size, torch.device("cpu"))
    config = load("configs/quickstart.yaml", overrides)
    export = worker.export_policy

    def export_whole(job, measure, text, **more):
        state = whole_state(measure.model)
        if index == 0:
            torch.save(state, Path(out) / "whole.pt")
        export(job, measure, text, **more)

    worker.export_policy = export_whole
    job = TrainJob(config=config, model=model, rows=Artifact(Path(rows), "rows"), out=out, key="job", method=method)
    worker.run_job(job, rank, FolderCheckpoints(rank, **checkpoints), RowTable.of)
    dist.destroy_process_group()
