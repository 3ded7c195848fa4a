"""Trials for real: Ray Tune over Ray Train, scored by evaluation actors, on two nodes; killed and gone on with."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from spo_ray.config.load import load
from spo_ray.runtime.run import Run
from spo_ray.sweep.results import rank
from spo_ray.sweep.space import listed_points

from ..conftest import ROOT
from .driver import small_run
from .test_space import LAMBDA, space

SIX = [
    space(
        methods__spo__lambda_sft="{type: grid, values: [0.01, 1.0, 30.0]}",
        methods__spo__base__beta="{type: grid, values: [0.1, 0.5]}",
    )
]
DEADLINE_S = 800
pytestmark = pytest.mark.slow


def start(folder, referenced, nodes, *overrides):
    """The driver in a process of its own; its output goes to a file."""
    command = [sys.executable, "-m", "tests.sweep.driver", str(folder), str(referenced.path), nodes, *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(ROOT)
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)


def finish(process, folder):
    assert process.wait(DEADLINE_S) == 0, (folder / "output.txt").read_text()[-5000:]
    return folder / "sweep-toy"


def table(run):
    with (run / "results.csv").open() as file:
        return list(csv.DictReader(file))


def rows(run):
    return [json.loads(path.read_text()) for path in sorted(run.glob("trials/*/row.json"))]


def wait_for(condition, folder):
    end = time.time() + DEADLINE_S
    while time.time() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError((folder / "output.txt").read_text()[-5000:])


def scored(folder, count, share=1.0):
    """Folders of trials with a score at a share of their steps, once there are so many."""

    def look():
        found = []
        for file in (folder / "sweep-toy" / ".unfinished" / "trials").glob("*/scores.jsonl"):
            lines = file.read_text().splitlines()
            if lines and json.loads(lines[-1])["share"] >= share:
                found.append(file.parent)
        return found if len(found) >= count else None

    return look


def processes(driver, name):
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def finished(referenced, tmp_path_factory):
    """Six trials on two nodes of two CPUs, under FIFO; ``raylets`` has the nodes' processes that had workers."""
    folder = tmp_path_factory.mktemp("finished")
    driver, raylets = start(folder, referenced, "2,2", *SIX), set()
    while driver.poll() is None:
        with suppress(psutil.NoSuchProcess):
            raylets |= {worker.ppid() for worker in processes(driver, "RayTrainWorker")}
        time.sleep(0.2)
    (folder / "raylets.json").write_text(json.dumps(sorted(raylets)))
    return finish(driver, folder)


def test_every_trial_has_a_row_and_the_best_its_checkpoint(finished):
    found = table(finished)
    points = listed_points(small_run(finished, *SIX).config)
    assert [float(line[LAMBDA]) for line in found] == [point["values"][LAMBDA] for point in points]
    assert {line["status"] for line in found} == {"finished"}
    assert {line["steps"] for line in found} == {"12"}
    for line in found:
        log = (finished / "trials" / line["trial"] / "training" / "log.jsonl").read_text().splitlines()
        last = json.loads(log[-1])
        assert float(line["delta_logp_chosen"]) == last["probe/delta_logp_chosen"]
        assert float(line["held_out_reward_accuracy"]) == last["held_out/accuracy"]
    best = rank(rows(finished), small_run(finished, *SIX).config.sweep)[0]
    kept = [path.parts[-3] for path in finished.glob("trials/*/training/model.safetensors")]
    assert kept == [row["trial"] for row in best.rows]
    written = load(finished / "best.yaml")
    assert written.methods["spo"].lambda_sft == best.values[LAMBDA]


def test_a_trial_is_the_ordinary_training_of_its_configuration(finished, referenced, tmp_path):
    """Stops on the way to be scored change nothing: the same steps, to the last bit."""
    from ..train import processes as plain

    out = tmp_path / "plain"
    config = Run(load(finished / "best.yaml", ["train.checkpoint.every=null"])).config
    overrides = [f"methods={json.dumps({'spo': config.methods['spo'].model_dump(mode='json', exclude_none=True)})}"]
    overrides += ["preference.epochs=2", "preference.probe_pairs=16", "preference.probe_every=20"]
    overrides += ["preference.dynamics_every=null", "preference.probe_top_tokens=0", "train.num_workers=1"]
    plain.train(1, str(referenced.path), out, overrides, "spo")
    trial = next(finished.glob("trials/*/training/model.safetensors")).parent
    loss = [record["loss"] for record in plain.log_of(out)[1:]]
    assert [record["loss"] for record in plain.log_of(trial)[1:]] == loss


def test_trials_are_spread_over_both_nodes(finished):
    assert len(json.loads((finished.parent / "raylets.json").read_text())) == 2
    assert "trials: 3 at a time" in (finished.parent / "output.txt").read_text()


def test_what_is_kept_of_a_trial_is_small(finished):
    for row in rows(finished):
        files = (finished / "trials" / row["trial"]).rglob("*")
        sizes = sum(path.stat().st_size for path in files if path.is_file() and path.name != "row.json")
        assert row["bytes"] == sizes
        assert row["checkpoint"] or row["bytes"] < 50_000
    assert not list((finished / ".unfinished").glob("*"))


def test_killed_worker_evaluator_and_driver(finished, referenced, tmp_path):
    """A trial's worker, an evaluation actor, and the driver after a third of the trials: with the same command every
    trial is accounted for, none that had finished is trained again, and all scores are those of the quiet run.
    """
    driver = start(tmp_path, referenced, "4", *SIX)
    wait_for(scored(tmp_path, 1, 0.25), tmp_path)
    victim = wait_for(lambda: processes(driver, "RayTrainWorker"), tmp_path)[0]
    victim.kill()
    wait_for(scored(tmp_path, 2, 0.25), tmp_path)
    wait_for(lambda: processes(driver, "ray::Evaluator"), tmp_path)[0].kill()
    done = wait_for(scored(tmp_path, 2), tmp_path)
    before = {trial.name: (trial / "training" / "result.json").stat().st_mtime_ns for trial in done}
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()  # before Ray Tune has noted what the second trial reached
    driver.wait()
    assert not psutil.wait_procs(family, timeout=240)[1]  # Ray's processes notice by themselves
    run = finish(start(tmp_path, referenced, "4", *SIX), tmp_path)
    for trial, written in before.items():
        assert (run / "trials" / trial / "training" / "result.json").stat().st_mtime_ns == written
    quiet, found = rows(finished), rows(run)
    assert [row["scores"] for row in found] == [row["scores"] for row in quiet]
    assert {row["status"] for row in found} == {"finished"}
    assert "trials: resume" in (tmp_path / "output.txt").read_text()
    again = finish(start(tmp_path, referenced, "4", *SIX), tmp_path)
    assert "trials: reused" in (tmp_path / "output.txt").read_text()
    assert rows(again) == found


def test_a_sweep_whose_evaluator_is_lost_ends_and_the_same_command_resumes_it(referenced, tmp_path):
    """The actor is killed as soon as it is there, so often that Ray starts it no more."""
    two = space(methods__spo__lambda_sft="{type: grid, values: [0.01, 30.0]}")
    driver = start(tmp_path, referenced, "4", two)
    while driver.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for actor in processes(driver, "ray::Evaluator"):
                actor.kill()
        time.sleep(0.2)
    said = (tmp_path / "output.txt").read_text()
    assert driver.returncode == 1, said[-5000:]
    assert "the evaluation actor is lost" in said
    assert "No result is lost: the same command resumes the sweep" in said
    found = rows(finish(start(tmp_path, referenced, "4", two), tmp_path))
    assert [row["status"] for row in found] == ["finished", "finished"]


def test_ctrl_c_leaves_a_sweep_that_the_same_command_goes_on_with(finished, referenced, tmp_path):
    driver = start(tmp_path, referenced, "4", *SIX)
    done = wait_for(scored(tmp_path, 2), tmp_path)
    before = {trial.name: (trial / "training" / "result.json").stat().st_mtime_ns for trial in done}
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(DEADLINE_S) == 130, (tmp_path / "output.txt").read_text()[-5000:]
    assert not psutil.wait_procs(family, timeout=240)[1]
    run = tmp_path / "sweep-toy"
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert not (run / "trials").exists()
    assert finish(start(tmp_path, referenced, "4", *SIX), tmp_path) == run
    for trial, written in before.items():
        assert (run / "trials" / trial / "training" / "result.json").stat().st_mtime_ns == written
    assert [row["scores"] for row in rows(run)] == [row["scores"] for row in rows(finished)]
    assert {row["status"] for row in rows(run)} == {"finished"}


def test_asha_and_the_rule_of_collapse_stop_trials_and_say_so(referenced, tmp_path):
    """Under a tiny ``max_fall`` whatever lowers log pi(y_w) collapses; of the others ASHA stops some."""
    overrides = [*SIX, "sweep.scheduler=asha", "sweep.max_fall=0.001", "preference.theta.lr=1e-3"]
    run = finish(start(tmp_path, referenced, "4", *overrides), tmp_path)
    found = rows(run)
    assert len(found) == 6
    for row in found:
        fell = -row["scores"]["delta_logp_chosen_per_token"]["value"] > 0.001 and row["share"] < 1
        assert row["reason"].startswith("collapse: log pi(y_w) fell by") == fell
        assert (row["status"] == "finished") == (row["share"] == 1.0)
        log = (run / "trials" / row["trial"] / "training" / "log.jsonl").read_text().splitlines()
        assert len(log) == row["steps"] + 1  # not a step more than it was scored at
    assert any(row["status"] == "stopped" for row in found)


def test_optuna_with_two_objectives(referenced, tmp_path):
    overrides = [
        space(methods__spo__lambda_sft="{type: loguniform, low: 0.01, high: 30}"),
        "sweep.searcher=optuna",
        "sweep.samples=4",
        "sweep.objectives=[delta_logp_chosen, -delta_logp_rejected]",
        "sweep.max_concurrent=1",
    ]
    found = rows(finish(start(tmp_path, referenced, "4", *overrides), tmp_path))
    drawn = [row["values"][LAMBDA] for row in found]
    assert len(set(drawn)) == 4
    assert all(0.01 <= value <= 30 for value in drawn)
    assert {row["status"] for row in found} == {"finished"}
