"""Interrupted training ends where uninterrupted training does: real workers, real signals."""

import json
import os
import random
import subprocess
import sys
import time

import psutil
import pytest

from ..conftest import ROOT

DEADLINE_S = 300


def start(folder, referenced, stages, *overrides):
    """The driver in a process of its own; its output goes to a file."""
    command = [sys.executable, "-m", "tests.train.interrupted", str(folder), str(referenced.path), stages, *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)


def finish(process, folder):
    assert process.wait(DEADLINE_S) == 0, (folder / "output.txt").read_text()[-5000:]
    return folder / "quickstart"


def wait_for_step(folder, name, step):
    """Until the log of a method that is being trained has a step."""
    log = folder / "quickstart" / ".unfinished" / f"method_{name}" / "log.jsonl"
    end = time.time() + DEADLINE_S
    while time.time() < end:
        if log.exists() and len(log.read_text().splitlines()) > step:
            return
        time.sleep(0.005)
    raise AssertionError((folder / "output.txt").read_text()[-5000:])


def workers(process):
    """The training processes of a driver's cluster."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [p for p in family if "RayTrainWorker" in " ".join(p.cmdline())]


def same(one, other, name):
    """Loss curve and parameters, bit for bit."""
    a, b = one / f"method_{name}", other / f"method_{name}"
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(referenced, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return finish(start(folder, referenced, "methods", "train.num_workers=2"), folder)


def test_resume_after_the_kill_of_a_rank(uninterrupted, referenced, tmp_path):
    """At a random step one of two workers is killed with SIGKILL; Ray Train starts the group again."""
    rng = random.Random()
    step, victim = rng.randint(1, 11), rng.randint(0, 1)
    print(f"step {step}, worker {victim}")
    process = start(tmp_path, referenced, "methods", "train.num_workers=2")
    wait_for_step(tmp_path, "spo", step)
    workers(process)[victim].kill()
    run = finish(process, tmp_path)
    for name in ("dpo", "spo"):
        same(run, uninterrupted, name)
    manifest = json.loads((run / "method_spo" / "manifest.json").read_text())
    assert manifest["facts"]["restarts"] == 1
    assert not list((run / ".unfinished").glob("train_*"))
