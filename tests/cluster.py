"""A cluster as ``ray start --head`` makes it, and jobs that are submitted to it."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from .conftest import ROOT

RAY = str(Path(sys.executable).with_name("ray"))


@contextmanager
def head(folder):
    """A head node on ports of its own, with token authentication; ends with its own processes only."""
    port, dashboard = free_port(), free_port()
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in an activated environment
    environment.pop("RAY_ADDRESS", None)
    # Two logical CPUs are the least that the plan fits in.
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}"]
    command += [f"--temp-dir=/tmp/ray-{os.getpid()}"]
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 300
        while not reachable(dashboard):
            assert process.poll() is None and time.time() < deadline, (folder / "head.log").read_text()
            time.sleep(0.5)
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", "GCS": f"127.0.0.1:{port}"}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def reachable(port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def submit(environment, job, *options):
    """``ray job submit``, which follows the job to its end."""
    command = [RAY, "job", "submit", "--working-dir", ".", *options, "--", *job]
    for _ in range(20):  # the server answers before its job agent is there
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
        if "No available agent" not in done.stderr:
            break
        time.sleep(5)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
