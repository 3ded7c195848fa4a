"""Log lines, JSON and bars: on a terminal, off it, and where spo_ray is only imported."""

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from datetime import datetime

import pytest
from rich.console import Console

from spo_ray.errors import UserError
from spo_ray.pipeline.cli import Output, guarded
from spo_ray.runtime import console
from spo_ray.runtime.console import CONTROL, LOGGER, log, show, warn

from ..conftest import ROOT

CODE = """
import time
from spo_ray.runtime import console
console.EVERY_S = 0.0
with console.installed():
    with console.progress("sft") as update:
        for step in range(4):
            update(step, 3, f"step {step}/3")
            time.sleep(0.2)
        console.log("other", "a [line] beside it :key:")
    console.log("sft", "done")
"""


def test_plain_lines_without_a_terminal():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert all(re.match(r"\[\d\d:\d\d:\d\d\] \w", line) for line in lines)
    assert [line[11:] for line in lines] == [
        "sft: step 0/3",
        "sft: step 1/3",
        "sft: step 2/3, about 0:00:00 left",
        "other: a [line] beside it :key:",
        "sft: done",
    ]


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
    assert re.search(r"\] other: a \[line\] beside it :key:\r?\n", plain)
    assert re.search(r"\] sft: done\r?\n", plain)


def test_a_narrow_terminal_cuts_the_text_not_the_name_nor_the_time():
    terminal, name = Console(file=io.StringIO(), force_terminal=True, width=80), "method_spo_simpo"
    bars = console._Bars()
    with bars.bar(name, terminal) as update:
        for step in range(3):
            update(step, 9, "step 2/9, loss 0.6387, chosen +0.19, rejected -0.06, margin +0.13, accuracy 75%")
            time.sleep(0.1)
        shown = terminal.render_lines(bars.progress.get_renderable(), pad=False)
    (line,) = ["".join(segment.text for segment in line) for line in shown]
    assert re.fullmatch(rf"{name} [━╺╸]+ step 2/9, .*… 0:00:00 0:00:0\d left ?", line)
    assert len(line) <= 80


def test_nothing_is_printed_where_spo_ray_is_only_imported():
    code = "import logging, spo_ray\nfrom spo_ray.runtime.console import log, warn\nlog('s', 'a')\nwarn('s', 'b')\n"
    code += "print([type(handler).__name__ for handler in logging.getLogger('spo_ray').handlers])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("['NullHandler']\n", "")


def work():
    log("sft", "100% of longkeyvalue sent")
    warn("sft", "ALARM")
    logging.getLogger("spo_ray.own").info("a record without a stage")
    print("the answer")
    raise UserError('set "longkeyvalue"')


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "longkeyvalue")


def test_lines_go_to_stdout_and_errors_to_stderr(secret, capsys):
    assert guarded(work) == 2
    printed = capsys.readouterr()
    assert re.sub(r"\[[\d:]{8}\] ", "", printed.out).splitlines() == [
        "sft: 100% of [JUDGE_API_KEY] sent",
        "sft: ALARM",
        "a record without a stage",
        "the answer",
    ]
    assert printed.err == 'error: set "[JUDGE_API_KEY]"\n'


def test_quiet_leaves_warnings_errors_and_the_answer(secret, capsys):
    assert guarded(work, Output(quiet=True)) == 2
    printed = capsys.readouterr()
    assert re.sub(r"\[[\d:]{8}\] ", "", printed.out).splitlines() == ["sft: ALARM", "the answer"]
    assert printed.err == 'error: set "[JUDGE_API_KEY]"\n'
    assert guarded(lambda: log("sft", "starts"), Output(quiet=True)) == 0
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


def test_json_lines_hold_time_level_stage_and_message(secret, capsys):
    before = datetime.now().astimezone()
    assert guarded(work, Output(log_json=True)) == 2
    printed = capsys.readouterr()
    assert printed.out == "the answer\n"
    records = [json.loads(line) for line in printed.err.splitlines()]
    assert [(record["level"], record["stage"], record["message"]) for record in records] == [
        ("INFO", "sft", "100% of [JUDGE_API_KEY] sent"),
        ("WARNING", "sft", "ALARM"),
        ("INFO", None, "a record without a stage"),
        ("ERROR", None, 'error: set "[JUDGE_API_KEY]"'),
    ]
    for record in records:
        assert abs((datetime.fromisoformat(record["time"]) - before).total_seconds()) < 60


@pytest.mark.parametrize("output", [Output(), Output(log_json=True)])
def test_secrets_are_struck_out_of_tracebacks_of_any_record(secret, capsys, output):
    def fail():
        try:
            raise RuntimeError("longkeyvalue")
        except RuntimeError:
            logging.getLogger("spo_ray.own").exception("sent %s", "longkeyvalue")
        raise RuntimeError("longkeyvalue")

    assert guarded(fail, output) == 1
    printed = capsys.readouterr()
    assert "longkeyvalue" not in printed.out + printed.err
    assert printed.err.count("RuntimeError: [JUDGE_API_KEY]") == 3  # both tracebacks, and the card


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\b\x7f\u202e\u2066\u2028\ud800\ttab\nline ü 🤖"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\r\\x08\\x7f\\u202e\\u2066\\u2028\\ud800\ttab\nline ü 🤖"


def test_control_characters_are_spelled_out_in_lines_errors_tracebacks_and_answers(capsys):
    def fail():
        log(HOSTILE, HOSTILE)
        show(HOSTILE)
        raise RuntimeError(HOSTILE)

    assert guarded(fail) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith(f" {SHOWN}: {SHOWN}\n{SHOWN}\n")
    assert printed.err.count(SHOWN) == 2  # the traceback and the card
    assert not CONTROL.search(printed.out + printed.err)


def test_handlers_of_the_program_come_back_after_a_command():
    before = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    assert guarded(lambda: None, Output(quiet=True)) == 0
    assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == before


@pytest.mark.parametrize(
    "says", ["print('x' * 10**6)", "rich.console.Console().print('x\\n' * 10**4)"], ids=["print", "rich"]
)
def test_a_reader_that_leaves_ends_a_command_without_a_word(says):
    """As ``| head -1`` does."""
    code = f"import sys, rich.console\nfrom spo_ray.pipeline.command import guarded\nsys.exit(guarded(lambda: {says}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 1)
