"""Processes that stand still are noticed, ended, and only those."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from spo_ray.runtime import heartbeat
from spo_ray.runtime.console import LOGGER
from spo_ray.runtime.heartbeat import Watch, watched

from ..conftest import ROOT

CODE = """
import sys, time
from pathlib import Path
from spo_ray.runtime import heartbeat
heartbeat.BEAT_S = 0.05
with heartbeat.beating(Path(sys.argv[1]), "an engine", float(sys.argv[2])):
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(LOGGER, "propagate", True)
    for name, seconds in {"BEAT_S": 0.05, "STILL_S": 0.5, "LOST_S": 1.5}.items():
        monkeypatch.setattr(heartbeat, name, seconds)


def at_work(folder, limit=60):
    command = [sys.executable, "-c", CODE, str(folder), str(limit)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "at work\n"
    return process


def test_a_stopped_process_is_named_and_ended_and_one_that_moves_is_not(fast, tmp_path, caplog):
    still = []
    with Watch(tmp_path / "beats", still.append):
        assert watched() == tmp_path / "beats"
        stopped, moving = at_work(watched()), at_work(watched())
        stopped.send_signal(signal.SIGSTOP)
        assert stopped.wait(20) == -signal.SIGKILL
        time.sleep(1.0)
        assert moving.poll() is None
        assert len(list(watched().iterdir())) == 1
    moving.kill()
    moving.wait()
    name = f"an engine (process {stopped.pid} on {heartbeat.socket.gethostname()})"
    told = [message for message in caplog.messages if str(stopped.pid) in message]
    assert told == [
        f"{name} has given no sign of life for 0.5 s",
        f"{name} is stopped; if Ray can restart it, its work is repeated",
    ]
    assert [name] in still and still[-1] == []
    assert not watched()
    assert not (tmp_path / "beats").exists()


def test_a_stopped_process_that_gives_no_signs_of_life_is_ended_too(fast, tmp_path, caplog):
    """Ray's own processes, and others in their first seconds."""
    process = subprocess.Popen(["sleep", "60"])
    with Watch(tmp_path / "beats"):
        process.send_signal(signal.SIGSTOP)
        assert process.wait(20) == -signal.SIGKILL
    name = f"sleep (process {process.pid})"
    ended = f"{name} is stopped; if Ray can restart it, its work is repeated"
    assert caplog.messages == [f"{name} has given no sign of life for 0.5 s", ended]


def test_processes_that_were_stopped_together_with_their_watcher_are_left_alone(fast, tmp_path, caplog, monkeypatch):
    """As by Ctrl-Z, or a virtual machine that pauses: for the watcher the clock jumps."""
    jump = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + jump[0])
    monkeypatch.setattr(heartbeat, "time", clock)
    with Watch(tmp_path / "beats"):
        process = at_work(watched())
        time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        jump[0] = 100.0
        time.sleep(0.2)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not caplog.messages


def test_a_call_that_takes_too_long_ends_its_process(tmp_path):
    (tmp_path / "beats").mkdir()
    process = at_work(tmp_path / "beats", 0.3)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL
    assert errors == "a call took longer than its limit of 0.3 s: this process ends\n"


def test_a_process_that_ended_without_a_word_is_not_taken_to_stand_still(fast, tmp_path, caplog):
    with Watch(tmp_path / "beats"):
        process = at_work(watched())
        process.kill()
        process.wait()
        limit = time.monotonic() + 20
        while list(watched().iterdir()) and time.monotonic() < limit:
            time.sleep(0.1)
        assert not list(watched().iterdir())
    assert not caplog.messages


def test_another_process_of_the_same_id_is_left_alone():
    sleeper = subprocess.Popen(["sleep", "60"])
    own = {"pid": sleeper.pid, "host": heartbeat.socket.gethostname(), "node": ""}
    started = psutil.Process(sleeper.pid).create_time()
    assert not heartbeat._kill(sleeper.pid, started - 9)
    assert sleeper.poll() is None
    assert heartbeat._on_its_node(heartbeat._kill, own | {"started": started})
    assert sleeper.wait(5) == -signal.SIGKILL
