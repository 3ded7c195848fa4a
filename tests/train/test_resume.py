"""Interrupted training ends where uninterrupted training does: real workers, real signals."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint

from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.runtime.artifact import Artifact
from spo_ray.runtime.run import STARTED
from spo_ray.train.entry import CHECKPOINTS, ControllerCallback, mend_checkpoints
from spo_ray.train.launch import group_name

from ..conftest import ROOT, with_reference
from ..model.test_real_weights import short_rows
from .interrupted import train

DEADLINE_S = 600


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


def workers(process, name="RayTrainWorker"):
    """The training processes of a driver's cluster."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [p for p in family if name in " ".join(p.cmdline())]


def same(one, other, name):
    """Loss curve and parameters, bit for bit."""
    a, b = one / f"method_{name}", other / f"method_{name}"
    assert (a / "log.jsonl").read_text() == (b / "log.jsonl").read_text()
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(referenced, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return finish(start(folder, referenced, "methods", "train.num_workers=2"), folder)


def test_resume_after_the_kill_of_a_rank_and_of_the_driver(uninterrupted, referenced, sft_rows, tmp_path):
    """At a random step one of two workers is killed with SIGKILL: Ray Train starts the group again. Then the driver is:
    with the same command nothing that was finished is done again, and the rest goes on from its checkpoint.
    """
    shutil.copytree(referenced.path, tmp_path / "rows" / "referenced")
    shutil.copytree(sft_rows.path, tmp_path / "rows" / "sft_rows")
    table = Artifact(tmp_path / "rows" / "referenced", "referenced")
    rng = random.Random()
    step, victim = rng.randint(1, 11), rng.randint(0, 1)
    print(f"step {step}, worker {victim}")
    process = start(tmp_path, table, "all", "train.num_workers=2")
    wait_for_step(tmp_path, "dpo", step)
    workers(process)[victim].kill()
    wait_for_step(tmp_path, "spo", 7)
    orphans = workers(process)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(orphans, timeout=60)[1]  # Ray's processes notice by themselves
    unfinished = tmp_path / "quickstart" / ".unfinished"
    result = unfinished / "method_dpo" / "result.json"
    written = result.stat().st_mtime_ns
    kept = (unfinished / "method_spo" / "log.jsonl").read_text().splitlines()[:7]
    run = finish(start(tmp_path, table, "all", "train.num_workers=2"), tmp_path)
    for name in ("dpo", "spo"):
        same(run, uninterrupted, name)
    assert (run / "method_dpo" / "result.json").stat().st_mtime_ns == written
    assert (run / "method_spo" / "log.jsonl").read_text().splitlines()[:7] == kept
    assert json.loads((run / "method_dpo" / "manifest.json").read_text())["facts"]["restarts"] == 1
    assert not list((run / ".unfinished").glob("train_*"))
    output = (tmp_path / "output.txt").read_text()
    assert output.count("sft: started") == 1
    assert "sft: reused" in output
    assert "method_spo: resume" in output


@pytest.mark.parametrize("storage", [None, "elsewhere"])
def test_what_ray_train_has_kept_of_a_finished_training_goes(storage, uninterrupted, referenced, tmp_path):
    """All was trained when the driver was killed, but it had not yet deleted the checkpoints."""
    root = tmp_path / "quickstart"
    shutil.copytree(uninterrupted, root)
    digests = []
    for name in ("dpo", "spo"):
        scratch = root / ".unfinished" / f"method_{name}"
        (root / f"method_{name}").replace(scratch)
        digests.append(json.loads((scratch / "manifest.json").read_text())["digest"])
        (scratch / "manifest.json").replace(scratch / STARTED)
    folder = tmp_path / storage if storage else root / ".unfinished"
    kept, another = folder / group_name("".join(digests)) / "checkpoint", folder / "train_0123456789abcdef"
    kept.mkdir(parents=True)
    another.mkdir()
    options = [f"train.checkpoint.storage={tmp_path / storage}"] if storage else []
    train(tmp_path, referenced.path, "methods", "train.num_workers=2", *options)
    assert list(folder.iterdir()) == [another]
    for name in ("dpo", "spo"):
        same(root, uninterrupted, name)


def test_a_list_of_checkpoints_that_cant_be_read_is_replaced_by_its_copy(tmp_path):
    listed, mend = tmp_path / CHECKPOINTS, partial(mend_checkpoints, LocalFileSystem(), str(tmp_path))
    assert mend() == ""
    listed.write_text("{}")
    assert mend() == ""
    listed.write_text('{"checkpoint_results": [')
    assert mend() == f"{listed} can't be read: training begins at step 0"
    assert not listed.exists()
    for content in ("[1]", "[1, 2]"):
        listed.write_text(content)
        ControllerCallback([]).after_report(None, [{}], Checkpoint(str(tmp_path / "step_1"), LocalFileSystem()))
        ControllerCallback([]).after_report(None, [{}], None)
    listed.write_text("")
    assert mend() == f"{listed} can't be read: its copy is used"
    assert listed.read_text() == "[1, 2]"


@pytest.mark.slow
def test_resume_after_a_full_disk(uninterrupted, referenced, tmp_path):
    """Checkpoints go to a file system with room for two: the third fails, the second is good for going on."""
    storage = tmp_path / "storage"
    storage.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(storage)], capture_output=True
    ).returncode:
        pytest.skip("a small file system can't be mounted here: that takes root")
    options = ["train.num_workers=2", f"train.checkpoint.storage={storage}", "train.checkpoint.keep=9"]
    try:
        process = start(tmp_path, referenced, "methods", *options)
        assert process.wait(DEADLINE_S) != 0
        output = (tmp_path / "output.txt").read_text()
        assert "could not be written to" in output
        assert str(storage) in output
        assert "No space left on device" in output
        subprocess.run(["mount", "-o", "remount,size=200m", str(storage)], check=True)
        run = finish(start(tmp_path, referenced, "methods", *options), tmp_path)
        # The failure is told asynchronously, so the method's last three steps may have been faster.
        assert re.search(": resume|method_dpo: reused", (tmp_path / "output.txt").read_text())
    finally:
        subprocess.run(["umount", "-l", str(storage)], check=True)
    for name in ("dpo", "spo"):
        same(run, uninterrupted, name)


@pytest.mark.slow
@pytest.mark.parametrize("step", sorted(random.Random(7).sample(range(1, 12), 10)))
def test_resume_after_the_kill_of_a_rank_at_any_step(step, uninterrupted, referenced, tmp_path):
    process = start(tmp_path, referenced, "methods", "train.num_workers=2")
    wait_for_step(tmp_path, "spo", step)
    workers(process)[step % 2].kill()
    run = finish(process, tmp_path)
    same(run, uninterrupted, "spo")


@pytest.mark.slow
def test_resume_after_the_kill_of_the_controller(uninterrupted, referenced, tmp_path):
    process = start(tmp_path, referenced, "methods", "train.num_workers=2")
    wait_for_step(tmp_path, "spo", 5)
    (controller,) = workers(process, "TrainController")
    controller.kill()
    run = finish(process, tmp_path)
    same(run, uninterrupted, "spo")
    assert "method_spo: the controller failed (ActorDiedError" in (tmp_path / "output.txt").read_text()
    assert json.loads((run / "method_spo" / "manifest.json").read_text())["facts"]["restarts"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resume_on_real_weights(smollm2, shared_data, tmp_path):
    """SPO on SmolLM2-135M-Instruct and UltraFeedback: the worker is killed, and after its restart the driver."""
    rows = short_rows(ChatTokenizer.load(smollm2), shared_data / "ultrafeedback" / "train.jsonl", 4)
    rows = [{"id": str(i)} | {k: v for k, v in row.items() if k.endswith("_ids")} for i, row in enumerate(rows)]
    folders = [tmp_path / name for name in ("rows", "whole", "cut")]
    for folder in folders:
        folder.mkdir()
    table, whole, cut = with_reference(smollm2, rows, folders[0]), *folders[1:]
    options = [f"model.path={smollm2}", "methods={spo: {type: spo}}", "preference.batch_size=2"]
    options += ["preference.theta.lr=1e-5", "preference.phi.lr=1e-5", "train.checkpoint.every=1"]
    finish(start(whole, table, "methods", *options), whole)
    process = start(cut, table, "methods", *options)
    wait_for_step(cut, "spo", 1)
    workers(process)[0].kill()
    wait_for_step(cut, "spo", 2)
    orphans = workers(process)
    process.kill()
    process.wait()
    psutil.wait_procs(orphans, timeout=120)
    run = finish(start(cut, table, "methods", *options), cut)
    same(run, whole / "quickstart", "spo")
    assert json.loads((run / "method_spo" / "manifest.json").read_text())["facts"]["restarts"] == 1
    assert "method_spo: resume" in (cut / "output.txt").read_text()


@pytest.mark.slow
def test_resume_after_a_lone_worker_that_stands_still(referenced, tmp_path):
    """Nobody waits for it in a collective: its heartbeat is missed."""
    process = start(tmp_path, referenced, "methods", "methods={spo: {type: spo}}", "train.checkpoint.every=3")
    wait_for_step(tmp_path, "spo", 5)
    workers(process)[0].suspend()
    stopped = time.monotonic()
    finish(process, tmp_path)
    assert time.monotonic() - stopped > 120
    output = (tmp_path / "output.txt").read_text()
    assert re.search(r"training worker 0 \(process \d+ on .*\) has given no sign of life for 60 s", output)
    assert "method_spo: no step for 6" in output
    assert "method_spo: worker 0 failed (" in output


@pytest.mark.slow
def test_resume_after_a_worker_that_stands_still(uninterrupted, referenced, tmp_path):
    """A stopped process answers no more: the others give up after train.timeout_s."""
    process = start(tmp_path, referenced, "methods", "train.num_workers=2", "train.timeout_s=15")
    wait_for_step(tmp_path, "spo", 5)
    workers(process)[1].suspend()
    run = finish(process, tmp_path)
    same(run, uninterrupted, "spo")


@pytest.mark.slow
def test_node_loss(uninterrupted, referenced, tmp_path):
    """One of two nodes is lost and replaced: the workers start again, spread over both, from the last checkpoint."""
    output = tmp_path / "output.txt"
    command = [sys.executable, "-m", "tests.train.node_loss", str(tmp_path), str(referenced.path)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    run = finish(process, tmp_path)
    print(next(line for line in output.read_text().splitlines() if line.startswith("RECOVERED")))
    same(run, uninterrupted, "spo")
    assert json.loads((run / "method_spo" / "manifest.json").read_text())["facts"]["restarts"] == 1
