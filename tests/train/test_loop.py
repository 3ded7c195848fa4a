"""The loop alone, on one number: what happens where it goes on from a checkpoint."""

from dataclasses import replace

import pytest
import torch

from spo_ray.config.train import CheckpointConfig
from spo_ray.errors import TrainingError
from spo_ray.model.optimizer import Group
from spo_ray.runtime.artifact import Artifact
from spo_ray.train.alarm import STOP
from spo_ray.train.checkpointer import Checkpointer
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

    def restore(self, model, optimizer):
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
