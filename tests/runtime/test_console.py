"""Progress on a real terminal and off it."""

import os
import pty
import re
import subprocess
import sys

from ..conftest import ROOT

CODE = """
import time
from spo_ray.runtime import console as progress
progress.EVERY_S = 0.0
with progress.progress("sft") as update:
    for step in range(4):
        update(step, 3, f"step {step}/3")
        time.sleep(0.2)
    progress.log("other", "a [line] beside it")
progress.log("sft", "done")
"""


def test_plain_lines_without_a_terminal():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [re.sub(r"^\[[\d:]+\] ", "", line) for line in done.stdout.splitlines()]
    assert lines == ["sft: step 0/3", "sft: step 1/3", "sft: step 2/3", "other: a [line] beside it", "sft: done"]


def test_a_live_view_on_a_terminal():
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", CODE], cwd=ROOT, stdout=theirs, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    assert process.wait() == 0
    text = written.decode()
    assert "step 3/3" in text
    assert "━" in text  # the bar
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor comes back
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
    assert re.search(r"\] other: a \[line\] beside it\r?\n", plain)
    assert re.search(r"\] sft: done\r?\n", plain)
