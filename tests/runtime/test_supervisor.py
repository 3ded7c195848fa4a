"""However a job's process ends: exit code, ``status.json``, last line and card agree."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from spo_ray.runtime.status import STATUS, is_alive, read_status

from ..conftest import ROOT

AGAIN = "stopped; finished stages are kept: the same command resumes the run"


def start(output, end, *before):
    command = [*before, sys.executable, "-m", "tests.runtime.supervised", str(output), end]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ending(process, folder):
    """Exit code, status, what was printed to stdout and stderr."""
    out, err = process.communicate(timeout=120)
    return process.returncode, read_status(folder / "quickstart" / STATUS), out, err


ENDS = [
    ("finish", "finished", 0, ""),
    ("refuse", "refused", 2, "error: set x\n"),
    ("fail", "failed", 1, "error: ValueError: seven\n"),
    ("exit", "failed", 1, "error: JobDiedError: the job's process ended without a word\n"),
    ("kill", "failed", 1, "error: JobDiedError: the job's process was ended by SIGKILL\n"),
    ("abort", "failed", 1, "error: JobDiedError: the job's process was ended by SIGABRT\n"),
    ("late", "finished", 0, ""),
]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    command = [sys.executable, "-m", "tests.runtime.supervised", str(folder), *(end for end, *_ in ENDS)]
    subprocess.run(command, cwd=ROOT, timeout=120)
    return folder


@pytest.mark.parametrize(("end", "state", "code", "last"), ENDS)
def test_exit_code_status_and_last_line_agree(ended, end, state, code, last):
    returned, out, err = ((ended / end / name).read_text() for name in ("code", "out", "err"))
    found = read_status(ended / end / "quickstart" / STATUS)
    assert (returned, found["state"], found["exit_code"]) == (str(code), state, code), err
    assert err.startswith(last)
    assert err.count("error:") == bool(last)
    assert out.count("finished; results in") == (state == "finished") * (1 + (end == "late"))
    assert (found.get("error") or {}).get("error", "") == last.removeprefix("error: ").rstrip()
    if end in ("exit", "kill", "abort"):
        assert "  stage   s\n" in err
        assert ("  log     RAY_LOG(FATAL): no connection to GCS\n" in err) == (end == "abort")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_signals_end_a_job_as_stopped(tmp_path, number):
    process = start(tmp_path, "wait", "env", "--default-signal=INT,HUP")
    process.stdout.readline(), process.stdout.readline()
    process.send_signal(number)
    returned, found, _, err = ending(process, tmp_path / "wait")
    assert (returned, found["state"], found["exit_code"], err) == (130, "stopped", 130, AGAIN + "\n")


def test_a_job_without_standard_streams_ends_as_any_other(tmp_path):
    words = [sys.executable, "-m", "tests.runtime.supervised", str(tmp_path), "finish"]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], cwd=ROOT, timeout=120)
    found = read_status(tmp_path / "finish" / "quickstart" / STATUS)
    assert (done.returncode, found["state"], found["exit_code"]) == (0, "finished", 0)


def test_a_killed_command_takes_its_job_along_and_the_next_one_says_so(tmp_path):
    process = start(tmp_path, "wait")
    while "waiting" not in process.stdout.readline():
        pass
    running = read_status(tmp_path / "wait" / "quickstart" / STATUS)
    assert running["state"] == "running"
    assert is_alive(running)
    assert not is_alive(running | {"process_started": running["process_started"] - 5})  # another process of that id
    process.kill()
    process.wait()
    psutil.wait_procs([psutil.Process(running["pid"])] if psutil.pid_exists(running["pid"]) else [], timeout=20)
    assert not is_alive(running)
    (tmp_path / "wait").rename(tmp_path / "finish")
    _, found, out, _ = ending(start(tmp_path, "finish"), tmp_path / "finish")
    assert found["state"] == "finished"
    assert f"job: the last attempt (process {running['pid']} on {running['host']}) was killed in s\n" in out


def test_a_job_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    command = "from spo_ray.runtime import supervisor; supervisor.GRACE_S = 0.5; import sys, runpy; "
    command += (
        "sys.argv = ['supervised', *sys.argv[1:]]; runpy.run_module('tests.runtime.supervised', None, '__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command, str(tmp_path), "deaf"], cwd=ROOT, stdout=-1, stderr=-1, text=True
    )
    process.stdout.readline(), process.stdout.readline()
    process.terminate()
    returned, found, _, err = ending(process, tmp_path / "deaf")
    assert (returned, found["state"], err) == (130, "stopped", AGAIN + "\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can't be mounted here: that takes root")
def test_a_full_disk_still_takes_the_status(tmp_path):
    """A file system that a stage fills to its last byte."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        returned, found, _, err = ending(start(tmp_path, "fill"), tmp_path / "fill")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert (returned, found["state"], found["exit_code"], found["stages"]) == (1, "failed", 1, ["s"]), err
    assert err.startswith("error: OSError: [Errno 28] No space left on device\n  stage   s\n  where   0 MiB free in ")
    assert "  try     free space on the disk; spo-ray plan shows how much a run takes\n" in err
    assert len(err.splitlines()) < 10
