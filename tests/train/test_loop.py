"""The loop alone, on one number: what happens where it goes on from a checkpoint."""

import pytest
import torch

from spo_ray.errors import TrainingError
from spo_ray.model.optimizer import Group
from spo_ray.runtime.artifact import Artifact
from spo_ray.train.alarm import STOP
from spo_ray.train.checkpointer import NoSnapshots
from spo_ray.train.distributed import Distributed
from spo_ray.train.loop import Callback, optimise
from spo_ray.train.score_gate import StoppedError
from spo_ray.train.spec import Job

from ..helpers import small_config
from .processes import log_of

TOTAL = 6


class OneSnapshot(NoSnapshots):
    """Behind step 3, in memory."""

    def __init__(self):
        super().__init__(Distributed(0, 1, torch.device("cpu")))
        self.extra = {}

    def restore(self, model, optimizer):
        return self.extra

    def due(self, step, total):
        return step == 3

    def save(self, model, optimizer, extra, record):
        self.extra = extra


class Seen(Callback):
    """Notes what it is called with; is killed or stopped behind a step, and sets off the alarm at one."""

    def __init__(self, error=None, alarm=None):
        self.error, self.alarm, self.behinds = error, alarm, []

    def on_step_end(self, record, indices):
        return {STOP: 1.0} if record["step"] == self.alarm else {}

    def on_step_logged(self, step):
        self.behinds.append(step)
        if step == 3 and self.error:
            raise self.error


@pytest.fixture
def loop(in_root, tmp_path):
    """Trains from a snapshot on, with a callback."""
    config = small_config(tmp_path)
    job = Job(config, "model", Artifact(tmp_path, "rows"), str(tmp_path), "own")

    def run(snapshots, callback, value=1.0):
        model = torch.nn.Linear(1, 1)
        groups = [Group("theta", dict(model.named_parameters()), config.sft)]

        def gradients(step, indices):
            return {n: torch.full_like(p, value) for n, p in model.named_parameters()}, {"loss": 1.0}

        batches = [[i] for i in range(TOTAL)]
        optimise(job, model, groups, batches, gradients, snapshots.rank, snapshots, [callback])

    return run


def test_many_steps_in_a_row_without_a_finite_gradient_end_the_training(loop):
    with pytest.raises(TrainingError, match="step 6: the gradient is not finite, 6 steps in a row"):
        loop(OneSnapshot(), Seen(), value=float("nan"))


def test_what_happens_behind_a_checkpoints_step_happens_when_it_goes_on_from_there(loop):
    """The worker was killed while the rung was being scored: the trial waits for it to be exported anew."""
    snapshots = OneSnapshot()
    with pytest.raises(OSError, match="killed"):
        loop(snapshots, Seen(error=OSError("killed")))
    again = Seen()
    loop(snapshots, again)
    assert again.behinds == [3, 4, 5, 6]


def test_a_training_that_was_stopped_behind_a_step_is_stopped_there_again(loop, tmp_path):
    snapshots = OneSnapshot()
    for _ in range(2):
        with pytest.raises(StoppedError):
            loop(snapshots, Seen(error=StoppedError()))
        assert log_of(tmp_path)[-1]["step"] == 3


def test_a_training_that_its_alarm_has_ended_makes_no_step_more(loop, tmp_path):
    snapshots = OneSnapshot()
    loop(snapshots, Seen(alarm=3))
    assert log_of(tmp_path)[-1]["step"] == 3
    again, log = Seen(), log_of(tmp_path)
    loop(snapshots, again)  # killed before its results were written
    assert again.behinds == [3]
    assert log_of(tmp_path) == log
