"""A cluster of two nodes as ``ray start`` makes them, with token authentication: the doctor, jobs, environments."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import ray
import ray._private.node
import yaml

from spo_ray.config.load import load
from spo_ray.errors import UserError
from spo_ray.runtime import cluster as clusters
from spo_ray.runtime.cluster import GCS_WAIT, TOO_SLOW, passed_env
from spo_ray.runtime.console import LOGGER

from ..cluster import RAY, free_port, head, submit
from ..conftest import ROOT
from ..pipeline.test_doctor import install

QUICKSTART = "configs/quickstart.yaml"
SECRET = "hf_averysecretvalue"
LOOK = """
import json, os, sys, time
import ray
from ray._private.utils import publish_error_to_driver
from spo_ray.runtime.cluster import connect
from spo_ray.config.load import load
connect(load("configs/quickstart.yaml", sys.argv[1:]))
publish_error_to_driver("worker_pool_large", "WARNING: 8 PYTHON workers", ray._private.worker.global_worker.gcs_client)
time.sleep(3)
@ray.remote
def look():
    return dict(os.environ), str(ray.get_runtime_context().runtime_env)
seen, described = ray.get(look.remote())
names = ("HF_ENDPOINT", "MY_SWITCH", "NCCL_DEBUG")
there = {n: seen.get(n) for n in names}
ray.shutdown()
try:
    look.remote()
except Exception:
    pass
found = {"leaks": [k for k, v in seen.items() if "averysecret" in v], "described": described}
print(json.dumps({"there": there, "again": ray.is_initialized(), **found}))
"""
SIZE = """
import os
from pathlib import Path
files = [p for p in Path.cwd().rglob("*") if p.is_file()]
print("FOUND", sum(p.stat().st_size for p in files), sorted(p.name for p in Path.cwd().iterdir()))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment for clients; the second node has another torch, as far as its metadata goes."""
    folder = tmp_path_factory.mktemp("cluster")
    with head(folder) as environment:
        other = folder / "other"
        other.mkdir()
        install(other, "torch", "9.9.9")
        path = os.pathsep.join([str(other), str(ROOT)])
        command = [RAY, "start", f"--address={environment['GCS']}", "--block", "--num-cpus=1"]
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        log = (folder / "node.log").open("w")
        options = {"stdout": log, "stderr": log, "start_new_session": True}
        node = subprocess.Popen(command, env=environment | {"PYTHONPATH": path}, **options)
        try:
            deadline = time.time() + 300
            while "Ray runtime started" not in (folder / "node.log").read_text():
                assert node.poll() is None and time.time() < deadline, (folder / "node.log").read_text()
                time.sleep(0.5)
            yield environment | {"PYTHONPATH": str(ROOT)}
        finally:
            os.killpg(node.pid, signal.SIGTERM)
            try:
                node.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)


def run(environment, *command):
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_doctor_finds_the_node_with_another_torch(cluster):
    command = [
        "-m",
        "spo_ray",
        "doctor",
        "--json",
        "--config",
        QUICKSTART,
        f"ray.address={cluster['GCS']}",
    ]
    done = run(cluster, sys.executable, *command)
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    nodes = [check for check in json.loads(done.stdout)["checks"] if check["name"].startswith("node ")]
    assert sorted(check["level"] for check in nodes) == ["failed", "ok"]
    (wrong,) = (check for check in nodes if check["level"] == "failed")
    assert "torch 9.9.9, here 2." in wrong["found"]
    assert wrong["fix"] == "install the same on every node: make setup"


@pytest.mark.slow
def test_workers_get_the_allowed_variables_and_no_secret(cluster):
    environment = cluster | {"HF_ENDPOINT": "http://hub", "MY_SWITCH": "1", "HF_TOKEN": SECRET, "NCCL_DEBUG": "INFO"}
    done = run(environment, sys.executable, "-c", LOOK, f"ray.address={cluster['GCS']}", "ray.pass_env=[HF_ENDPOINT]")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PYTHON workers" not in done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["there"] == {"HF_ENDPOINT": "http://hub", "MY_SWITCH": None, "NCCL_DEBUG": None}
    assert not seen["again"]  # nothing joins a cluster by itself after the run's end
    assert seen["leaks"] == []
    assert "averysecret" not in seen["described"]


@pytest.mark.slow
def test_a_job_takes_a_small_folder_along_and_may_set_a_passed_variable_itself(cluster):
    environment = {"env_vars": {"HF_ENDPOINT": "http://of-the-job"}}
    job = ["python", "-c", f"{SIZE}\nimport sys; sys.argv[1:] = []\n{LOOK}"]
    printed = submit(
        cluster | {"HF_ENDPOINT": "http://hub", "HF_TOKEN": SECRET}, job, "--runtime-env-json", json.dumps(environment)
    )
    size, names = next(line for line in printed.splitlines() if line.startswith("FOUND")).split(" ", 2)[1:]
    assert int(size) < 4 * 2**20
    assert {"spo_ray", "pipelines", "configs", "assets", "examples"} <= set(yaml.safe_load(names))
    assert not {"tests", "docs", "benchmarks", "runs", ".venv", ".git"} & set(yaml.safe_load(names))
    seen = json.loads(next(line for line in printed.splitlines() if line.startswith('{"there"')))
    assert seen["there"]["HF_ENDPOINT"] == "http://of-the-job"
    assert seen["leaks"] == []


def test_secrets_can_not_be_passed(in_root, monkeypatch):
    with pytest.raises(UserError, match="HF_TOKEN may be a secret"):
        load(QUICKSTART, ["ray.pass_env=[HF_TOKEN]"])
    monkeypatch.setenv("HTTPS_PROXY", "http://me:password1@proxy:3128")
    with pytest.raises(UserError, match="HTTPS_PROXY holds a password"):
        passed_env(load(QUICKSTART))
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert passed_env(load(QUICKSTART))["HTTPS_PROXY"] == "http://proxy:3128"


def test_a_cluster_that_starts_too_slowly_is_waited_for(monkeypatch, caplog):
    """``ray.init`` is a stand-in here: a machine that is busy to that degree can't be had at will."""
    ray_says = inspect.getsource(ray._private.node)
    assert TOO_SLOW.split("node ")[1] in ray_says.replace('"\n                        "', "")
    assert GCS_WAIT in ray_says
    failures = [Exception(f"The current {TOO_SLOW}."), Exception(TOO_SLOW), None, ValueError("another")]
    calls, took = [], 0.1

    def init(**options):
        calls.append((options, os.environ[GCS_WAIT]))
        time.sleep(took)
        if error := failures.pop(0):
            raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(clusters, "SLOW_START_S", 0.05)
    monkeypatch.setattr(LOGGER, "propagate", True)
    monkeypatch.setenv(GCS_WAIT, "")
    monkeypatch.delenv(GCS_WAIT)
    clusters.start_local(99.5, num_cpus=3)
    assert calls == [({"address": "local", "num_cpus": 3}, "100")] * 3
    assert caplog.messages == ["the machine is busy: no cluster after 0.05 s; waiting for ray.start_timeout_s=99.5"]
    with pytest.raises(ValueError, match="another"):
        clusters.start_local(99.5, num_cpus=3)
    failures, calls = [Exception(TOO_SLOW)] * 9, []
    with pytest.raises(Exception, match=TOO_SLOW):
        clusters.start_local(0.15, num_cpus=3)
    assert 1 <= len(calls) < 9
