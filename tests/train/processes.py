"""Training processes over Gloo without Ray: the same code, started by torch's own launcher."""

import json
import multiprocessing
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spo_ray.config.load import load
from spo_ray.runtime.artifact import Artifact
from spo_ray.train import worker
from spo_ray.train.checkpointer import STATE, NoSnapshots, collect, load_tensors, write_tensors
from spo_ray.train.data_loader import RowTable
from spo_ray.train.distributed import Distributed
from spo_ray.train.spec import Job

from ..conftest import ROOT


class FolderSnapshots(NoSnapshots):
    """Checkpoints in a folder: one is read, or one is written behind a step, and training ends there."""

    def __init__(self, rank, read=None, write=None, at=None):
        super().__init__(rank)
        self.read, self.write, self.at = read, write, at

    def restore(self, model, optimizer):
        if self.read is None:
            return {}
        load_tensors(str(self.read), model, optimizer, self.rank)
        return json.loads((Path(self.read) / STATE).read_text())

    def due(self, step, total):
        return step == self.at

    def save(self, model, optimizer, extra, record):
        write_tensors(str(self.write), collect(model, optimizer, self.rank))
        if self.rank.index == 0:
            (Path(self.write) / STATE).write_text(json.dumps(extra))


def train(workers, rows, out, overrides, method=None, model="assets/toy_base", **snapshots):
    """Train in some processes. Leaves the export, the log, and ``whole.pt``: the parameters as they were trained."""
    out.mkdir(parents=True, exist_ok=True)
    start = tempfile.mktemp(dir=out)
    arguments = (workers, start, rows, str(out), overrides, method, str(model), snapshots)
    # Forks of a server that has made the imports: seconds each otherwise. (Forks of this process, which other tests may
    # have left with threads, could wait for a lock for ever.)
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(_process, arguments, nprocs=workers, start_method="forkserver")
    return torch.load(out / "whole.pt", weights_only=True)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _process(index, size, start, rows, out, overrides, method, model, snapshots):
    import os

    os.chdir(ROOT)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{start}", rank=index, world_size=size)
    rank = Distributed(index, size, torch.device("cpu"))
    config = load("configs/quickstart.yaml", overrides)
    save = worker.save

    def save_whole(model, *arguments):
        state = worker.whole_state(model)
        if index == 0:
            torch.save(state, Path(out) / "whole.pt")
        save(model, *arguments)

    worker.save = save_whole
    job = Job(config, model, Artifact(Path(rows), "rows"), out, "job", method)
    worker.run_job(job, rank, FolderSnapshots(rank, **snapshots), RowTable.of)
    dist.destroy_process_group()
