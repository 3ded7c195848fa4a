"""The loop alone, on one number: what happens where it goes on from a checkpoint."""

import json
import os
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.train import Checkpoint
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from spo_ray.config.train import CheckpointConfig
from spo_ray.errors import TrainingError
from spo_ray.model.optimizer import Group
from spo_ray.runtime.artifact import Artifact
from spo_ray.train.alarm import STOP
from spo_ray.train.checkpointer import STATE, Checkpointer, Progress, collect
from spo_ray.train.distributed import Distributed
from spo_ray.train.loop import Callback, optimise
from spo_ray.train.score_gate import StoppedError
from spo_ray.train.spec import TrainJob

from ..helpers import small_config
from .processes import log_of

TOTAL = 6


class OneCheckpoint(Checkpointer):
    """A checkpoint after step 3, in memory."""

    def __init__(self):
        super().__init__("own", CheckpointConfig(every=None), Distributed(0, 1, torch.device("cpu")))
        self.progress = None

    def restore(self, model, optimizer, damaged, unread):
        return self.progress

    def due(self, step, total):
        return step == 3

    def save(self, model, optimizer, progress, record):
        self.progress = replace(progress)


class Seen(Callback):
    """Records the steps it is called with; raises after step 3, or sets off the alarm at a step."""

    def __init__(self, error=None, alarm=None):
        self.error, self.alarm, self.logged = error, alarm, []

    def on_step_end(self, record, indices):
        return {STOP: 1.0} if record["step"] == self.alarm else {}

    def on_step_logged(self, step):
        self.logged.append(step)
        if step == 3 and self.error:
            raise self.error


@pytest.fixture
def loop(in_root, tmp_path):
    """Trains from a checkpoint on, with a callback."""
    config = small_config(tmp_path)
    job = TrainJob(config=config, model="model", rows=Artifact(tmp_path, "rows"), out=str(tmp_path), key="own")

    def run(checkpointer, callback, value=1.0):
        model = torch.nn.Linear(1, 1)
        groups = [Group("theta", dict(model.named_parameters()), config.sft)]

        def gradients(step, indices):
            return {n: torch.full_like(p, value) for n, p in model.named_parameters()}, {"loss": 1.0}

        batches = [[i] for i in range(TOTAL)]
        optimise(job, model, groups, batches, gradients, checkpointer, [callback])

    return run


def test_many_steps_in_a_row_without_a_finite_gradient_end_the_training(loop):
    with pytest.raises(TrainingError, match="step 6: the gradient is not finite, 6 steps in a row"):
        loop(OneCheckpoint(), Seen(), value=float("nan"))


def test_steps_and_the_wait_for_a_checkpoint_have_a_limit(loop):
    """Here the limit is reached at once, and the checkpoint is written then; a worker's heartbeat ends the process."""
    checkpointer, entered = OneCheckpoint(), []

    @contextmanager
    def limited():
        entered.append(checkpointer.pending)
        checkpointer.pending = 0
        yield

    checkpointer.limited, checkpointer.pending = limited, 1
    checkpointer.wait()
    loop(checkpointer, Seen())
    assert entered == [1, *[0] * TOTAL, 0]  # the wait, the steps, and the wait at their end


def test_what_happens_behind_a_checkpoints_step_happens_when_it_goes_on_from_there(loop):
    """The worker was killed while the rung was being scored: the trial waits for it to be exported anew."""
    checkpointer = OneCheckpoint()
    with pytest.raises(OSError, match="killed"):
        loop(checkpointer, Seen(error=OSError("killed")))
    again = Seen()
    loop(checkpointer, again)
    assert again.logged == [3, 4, 5, 6]


def test_a_training_that_was_stopped_behind_a_step_is_stopped_there_again(loop, tmp_path):
    checkpointer = OneCheckpoint()
    for _ in range(2):
        with pytest.raises(StoppedError):
            loop(checkpointer, Seen(error=StoppedError()))
        assert log_of(tmp_path)[-1]["step"] == 3


def test_a_training_that_its_alarm_has_ended_makes_no_step_more(loop, tmp_path):
    checkpointer = OneCheckpoint()
    loop(checkpointer, Seen(alarm=3))
    assert log_of(tmp_path)[-1]["step"] == 3
    again, log = Seen(), log_of(tmp_path)
    loop(checkpointer, again)  # killed before its results were written
    assert again.logged == [3]
    assert log_of(tmp_path) == log


def test_damaged_checkpoints_are_left_out(tmp_path, monkeypatch):
    """Three real checkpoints, of which Ray Train's list is made up: that of step 6 is as it was after step 6."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rank, model = Distributed(0, 1, torch.device("cpu")), torch.nn.Linear(100, 100)
        optimizer, kept, weights = torch.optim.AdamW(model.parameters()), [], {}
        for step in (3, 6, 9):
            model(torch.randn(2, 100)).sum().backward()
            optimizer.step()
            folder = tmp_path / f"step_{step}"
            dcp.save(collect(model, optimizer, rank), storage_writer=FileSystemWriter(str(folder)))
            (folder / STATE).write_text(json.dumps(asdict(Progress(step=step))))
            kept.append(SimpleNamespace(checkpoint=Checkpoint(str(folder)), metrics={"job": "own", "step": step}))
            weights[step] = model.weight.detach().clone()
        monkeypatch.setattr("ray.train.get_checkpoint", lambda: kept[-1].checkpoint)
        monkeypatch.setattr("ray.train.get_all_reported_checkpoints", lambda: kept)
        checkpointer, unread = Checkpointer("own", CheckpointConfig(every=3), rank), []
        for file in (tmp_path / "step_9").glob("*.distcp"):
            os.truncate(file, file.stat().st_size // 2)

        def restored(*damaged):
            return checkpointer.restore(model, optimizer, damaged, lambda name, reason: unread.append(name))

        assert restored() == Progress(step=6)
        assert torch.equal(model.weight, weights[6])
        assert unread == ["step_9"]
        assert checkpointer.left_out == 1
        os.truncate(tmp_path / "step_6" / ".metadata", 0)
        os.truncate(tmp_path / "step_3" / STATE, 5)
        with pytest.raises(RuntimeError, match=r"^no checkpoint can be read: training begins at step 0$"):
            restored("step_9")
        assert unread[1:] == ["step_6", "step_3"]
        assert checkpointer.left_out == 3
        assert restored("step_9", "step_6", "step_3") is None
        monkeypatch.setattr(kept[0].checkpoint, "as_directory", lambda: (_ for _ in ()).throw(OSError("away")))
        with pytest.raises(OSError, match="away"):  # a storage that can't be reached is no damage
            restored("step_9", "step_6")
        assert len(unread) == 3
    finally:
        dist.destroy_process_group()
