"""``status.json`` beside a run's stages: what it is doing, and what became of it, for people and for other programs."""

import os
import socket
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from spo_ray.errors import UserError
from spo_ray.failure import Card, card_of, command_line
from spo_ray.redact import redact
from spo_ray.run import Run, write_json

STATUS = "status.json"
TRACEBACK = "traceback.txt"
EXIT_CODES = {"finished": 0, "failed": 1, "refused": 2, "stopped": 130}


@contextmanager
def recorded(run: Run) -> Generator[None]:
    """Keep ``status.json`` current while a run is at work, and say in it how it ended.

    ``state`` is ``running`` (a ``pid`` that is gone on ``host`` was killed), ``finished``, ``failed``, ``refused`` (bad
    input) or ``stopped`` (Ctrl-C, SIGTERM); ``exit_code`` is the process's, which ``ray job submit`` does not pass on.
    """
    status: dict[str, Any] = {
        "state": "running",
        "command": command_line(),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.time(),
    }

    lock = threading.Lock()  # stages are opened and closed in several threads

    def write(**changes: Any) -> None:
        with lock:
            status.update(changes, stages=list(run.under_way), updated=time.time())
            write_json(run.root / STATUS, status)

    unwatched, run.changed = run.changed, write
    write()
    (run.root / TRACEBACK).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        state = "refused" if isinstance(error, UserError) else "failed" if isinstance(error, Exception) else "stopped"
        if state == "failed":
            (run.root / TRACEBACK).write_text(redact("".join(traceback.format_exception(error))))
        details = str(run.root / TRACEBACK) if state == "failed" else ""
        card = card_of(error, run.under_way, details)
        error.__dict__["card"] = card
        write(state=state, exit_code=EXIT_CODES[state], error=None if state == "stopped" else card.dump())
        raise
    else:
        write(state="finished", exit_code=0)
    finally:
        run.changed = unwatched


def card_on(error: BaseException) -> Card:
    """The card that was made where the error passed a run, or a new one."""
    return getattr(error, "card", None) or card_of(error)
