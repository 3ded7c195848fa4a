"""What a training stage is made anew for, and what a worker finds in memory for the next job."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from spo_ray.runtime.artifact import Artifact, external
from spo_ray.runtime.run import Run
from spo_ray.train.launch import train_methods, train_sft
from spo_ray.train.memory_check import RetainedMemory
from spo_ray.train.spec import Start, TrainJob

from ..helpers import small_config


@pytest.fixture
def stages(in_root, toy_base, referenced, tmp_path, monkeypatch):
    """A function of overrides: all that SFT and the method dpo depend on besides their inputs, as JSON."""

    def depend(*overrides):
        found = {}

        def note(self, stage, **options):
            found[stage.name] = json.dumps(stage.config, sort_keys=True, default=str)
            return Artifact(tmp_path, stage.name)

        monkeypatch.setattr(Run, "open", note)
        run, base = Run(small_config(tmp_path, *overrides)), external(toy_base)
        train_sft(run, base, referenced)
        train_methods(run, {"dpo": Start(base, referenced)})
        return found["sft"], found["method_dpo"]

    return depend


def test_the_modules_that_are_trained_matter_to_sft_where_theta_is_an_adapter(stages):
    narrow, adapter = "model.lora_targets=[q_proj]", "model.theta={type: adapter}"
    assert stages()[0] == stages(narrow)[0]
    assert stages(adapter)[0] != stages(adapter, narrow)[0]


def test_which_checkpoints_there_are_matters_where_the_best_is_taken(stages):
    best, four, eight = ("train.checkpoint.best={}", "train.checkpoint.every=4", "train.checkpoint.every=8")
    assert stages(four) == stages(eight)
    assert stages(four, best)[1] != stages(eight, best)[1]
    assert stages(four, best, "train.checkpoint.keep=3")[1] != stages(four, best)[1]
    assert stages(four, best)[0] == stages(four)[0]  # SFT takes its last


def test_sft_has_no_best_checkpoint(in_root, referenced, tmp_path):
    config = small_config(tmp_path, "train.checkpoint={every: 4, best: {}}")
    job = TrainJob(config=config, model="model", rows=referenced, out="out", key="key")
    assert job.checkpoint == config.train.checkpoint.model_copy(update={"best": None})
    assert replace(job, method="dpo").checkpoint == config.train.checkpoint


def take_and_free() -> list[float]:
    """Return what an earlier job is taken to hold, as shares of a tensor: while it is there and after it is gone."""
    retained, size = RetainedMemory(), 2**29
    taken = torch.ones(size // 4)
    held = retained.now() / size
    del taken
    return [held, retained.now() / size]


def test_what_an_earlier_job_took_is_there_for_the_next():
    # In a fresh process: this one may give back the models of earlier tests at the same time.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        held, after = pool.submit(take_and_free).result()
    assert held >= 0.9
    assert after < 0.1
