"""``status.json``: what a run is doing, or how it ended; written by its process, or by the supervisor of that."""

import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from spo_ray.errors import UserError
from spo_ray.runtime.artifact import set_aside, write_json, write_text
from spo_ray.runtime.console import LOGGER, log, place, redact, visible
from spo_ray.runtime.failure import AGAIN, MAX_LOG_LINES, NO_SPACE, Card, card_of, command_line
from spo_ray.runtime.heartbeat import BEATS, Watch
from spo_ray.runtime.run import Run
from spo_ray.runtime.supervisor import Ending, tell

STATUS = "status.json"
RESERVE, RESERVED = ".reserve", 2**16
"""File of so many bytes that is there while a run is: where the disk is full, it makes room for ``status.json``."""
TRACEBACK = "traceback.txt"
EXIT_CODES = {"finished": 0, "failed": 1, "refused": 2, "stopped": 130}


class JobDiedError(RuntimeError):
    """The process of a job ended without saying why."""


@contextmanager
def recorded(run: Run) -> Generator[None]:
    """Keep ``status.json`` current while a run's stages are executed, and record there how the run ended.

    ``state`` is ``running``, ``finished``, ``failed``, ``refused`` (bad input) or ``stopped`` (Ctrl-C, SIGTERM,
    SIGHUP). A run in state ``running`` was killed if :func:`is_alive` is False. ``earlier_s`` are the seconds of
    earlier attempts. ``exit_code`` is that of the process, which ``ray job submit`` does not pass on: it ends with 1,
    or with 0 after ``ray job stop``. The run's lock must be held.
    """
    file = run.root / STATUS
    earlier = read_status(file)
    _log_stale(earlier)
    status: dict[str, Any] = {
        "state": "running",
        "command": command_line(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "started": time.time(),
        "earlier_s": seconds_of(earlier),
    }
    lock = threading.Lock()  # stages begin and end in several threads

    def write(**changes: Any) -> None:
        with lock:
            status.update(changes, stages=list(run.under_way), updated=time.time())
            write_status(file, status)

    before, run.changed = run.changed, write
    with suppress(OSError):
        write_text(run.root / RESERVE, "\n" * RESERVED)
    write()
    tell(status=str(file))
    trace = run.root / TRACEBACK
    if trace.is_dir():
        set_aside(trace, "is a folder")
    trace.unlink(missing_ok=True)
    try:
        with Watch(run.root / BEATS, lambda names: write(still=names)):
            yield
    except BaseException as error:
        state = "refused" if isinstance(error, UserError) else "failed" if isinstance(error, Exception) else "stopped"
        details = ""
        if state == "failed":
            with suppress(OSError):  # the disk may be full
                trace.touch(mode=0o600)
                trace.write_text(visible(redact("".join(traceback.format_exception(error)))))
                details = str(trace)
        card = card_of(error, run.under_way, details)
        if NO_SPACE in card.error:
            card = replace(card, where=[*card.where, _room(run.root)])
        error.__dict__["card"] = card
        write(state=state, exit_code=EXIT_CODES[state], error=None if state == "stopped" else asdict(card))
        raise
    else:
        write(state="finished", exit_code=0)
    finally:
        run.changed = before
        (run.root / RESERVE).unlink(missing_ok=True)


def write_status(file: Path, status: dict[str, Any]) -> None:
    """Write ``status.json``, also to a full disk: then in the room of the reserve."""
    try:
        write_json(file, status)
    except OSError:
        with suppress(OSError):
            file.with_name(RESERVE).unlink()
            write_json(file, status)


def read_status(file: Path) -> dict[str, Any]:
    """Return the content of a ``status.json``; empty if there is none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def seconds_of(status: dict[str, Any]) -> float:
    """Return the seconds that a run has taken in all its attempts, by its status; 0 if it does not say."""
    with suppress(LookupError, TypeError, ValueError):
        return float(status["updated"]) - float(status["started"]) + float(status.get("earlier_s", 0.0))
    return 0.0


def is_alive(status: dict[str, Any]) -> bool:
    """Return True if the process of a status runs on this host: a process with its id that started when it did."""
    if status.get("host") != socket.gethostname():
        return False
    with suppress(psutil.Error, TypeError, ValueError, OverflowError):
        return abs(psutil.Process(status["pid"]).create_time() - status["process_started"]) < 1.0
    return False


def _log_stale(status: dict[str, Any]) -> None:
    """Log that an earlier run was killed, if its status says that it is running although nobody holds the lock."""
    if status.get("state") == "running" and not is_alive(status):
        stages = status.get("stages")
        at = f"in {', '.join(map(str, stages))}" if isinstance(stages, list) and stages else "between stages"
        log("job", f"the last attempt (process {status.get('pid')} on {status.get('host')}) was killed {at}")


def _room(root: Path) -> str:
    """Return how much room the disks of a run and of temporary files have."""
    folders = {place(root): root, tempfile.gettempdir(): Path(tempfile.gettempdir())}
    free = {name: shutil.disk_usage(folder).free / 2**20 for name, folder in folders.items()}
    return ", ".join(f"{mib:.0f} MiB free in {name}" for name, mib in free.items())


def settle(ending: Ending) -> int:
    """Return the exit code of a job's process; if it did not say how it ended, record it and say it in its stead.

    What the process itself recorded holds; a process that died before is ``stopped`` if its supervisor was told to
    stop, else ``failed``.
    """
    if "code" in ending.told:
        return int(ending.told["code"])
    file = Path(ending.told.get("status", ""))
    status: dict[str, Any] = read_status(file)
    begun = status.get("pid") == ending.pid
    if not begun:
        status = {"state": "running"}
    if status["state"] == "running":
        state = "stopped" if ending.stopped_by else "failed"
        how = f"was ended by {_signal(-ending.returncode)}" if ending.returncode < 0 else "ended without a word"
        card = card_of(JobDiedError(f"the job's process {how}"), status.get("stages"))
        card = replace(card, log=[redact(line) for line in ending.native if line.strip()][-MAX_LOG_LINES:])
        status["error"] = None if state == "stopped" else asdict(card)
        status.update(state=state, exit_code=EXIT_CODES[state], updated=time.time())
        if begun:
            write_status(file, status)
            file.with_name(RESERVE).unlink(missing_ok=True)
    _say(status, file.parent)
    return int(status["exit_code"])


def _signal(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _say(status: dict[str, Any], root: Path) -> None:
    """Log the last line of a job, or its card."""
    if status["state"] == "finished":
        log("job", f"finished; results in {place(root)}")
    elif status["state"] == "stopped":
        LOGGER.error(f"stopped; {AGAIN}")
    else:
        LOGGER.error(Card(**status["error"]).text())
