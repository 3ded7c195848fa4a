"""A failure in a form that helps: the error without its wrapping, where it came up, and what to do next."""

import errno
import os
import re
import shlex
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spo_ray.errors import UserError
from spo_ray.runtime.artifact import write_json
from spo_ray.runtime.console import redact
from spo_ray.runtime.run import Run

FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.+)')
PID = re.compile(r"pid[=:]\s*(\d+)")
CAUSED = "The above exception was the direct cause"
"""Between the tracebacks of a chain, innermost first."""
NOTES = ("row ", "shard ")
"""What :mod:`spo_ray.runtime.map_rows` notes on exceptions."""
FRAMES, LOG_LINES, ERROR_LINES = 3, 5, 12
AGAIN = "finished stages are kept: the same command goes on from there"
ADVICE = {
    "OutOfMemoryError": "lower train.pairs_per_backward, train.max_length or engine.arguments' gpu_memory_utilization, "
    "or set train.gradient_checkpointing=true: spo-ray plan shows what a training needs",
    "OutOfDiskError": "make room where Ray keeps its objects (--temp-dir of ray start), then run the same command",
    "ObjectStoreFullError": "start Ray with more --object-store-memory",
    "ActorDiedError": "a process was killed, often for its memory: look at the node's kernel log, and lower "
    "engine.memory_gib, engine.replicas or train.num_workers",
    "WorkerCrashedError": "a process was killed, often for its memory: look at the node's kernel log",
    "NodeDiedError": "bring the node back, or lower train.num_workers; the same command goes on",
    "RuntimeEnvSetupError": "keep the working directory small (.rayignore), and the packages installed on all nodes",
    "AuthenticationError": "export RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token on every node",
    "ModuleNotFoundError": "install it on every node: spo-ray doctor compares them",
}
"""By the error's class."""
TOO_SLOW = "node timed out during startup"
"""In Ray's message where a node took longer than its 30 seconds."""


@dataclass(frozen=True)
class Card:
    """What to know about a failure."""

    error: str
    stages: list[str]
    """That were under way."""
    where: list[str]
    """Row, shard or rank, as far as they are known."""
    code: list[str]
    """The innermost places in the source."""
    log: list[str]
    """The last lines of the process that failed."""
    advice: str
    command: str = ""
    details: str = field(default="", compare=False)
    """The file with the whole traceback."""

    def text(self) -> str:
        """For a terminal."""
        rows = [("stage", ", ".join(self.stages)), ("where", "; ".join(self.where))]
        rows += [("code", line) for line in self.code] + [("log", line) for line in self.log]
        rows += [("details", self.details), ("try", self.advice), ("then", f"{AGAIN}\n{'':10}{self.command}".rstrip())]
        lines = [f"error: {self.error}"]
        lines += [f"  {head:<7} {value}" for head, value in rows if value]
        return "\n".join(lines)

    def dump(self) -> dict[str, Any]:
        """For ``status.json``."""
        return asdict(self)


def card_of(error: BaseException, stages: list[str] | None = None, details: str = "") -> Card:
    """The card of an exception, with everything that Ray wraps around it taken off."""
    chain = list(_chain(error))
    cause = chain[-1]
    told, notes = _told(chain)
    where = [note for link in chain for note in (*_rank(link), *getattr(link, "__notes__", []))] + notes
    text = "" if isinstance(cause, UserError) else f"{type(cause).__name__}: "
    return Card(
        redact(told or f"{text}{_first_lines(str(cause))}"),
        list(stages or []),
        [redact(note) for note in dict.fromkeys(where)],
        [] if isinstance(cause, UserError) else [redact(line) for line in _code(chain)],
        [redact(line) for line in _log_lines(chain)],
        _advice(cause),
        command_line(),
        details,
    )


def command_line() -> str:
    """What was typed, without secrets."""
    program = Path(sys.argv[0])
    head = [_typed(Path(sys.executable)), str(program)] if program.suffix == ".py" else [_typed(program)]
    return redact(shlex.join([*head, *sys.argv[1:]]))


def _typed(program: Path) -> str:
    """How a program is called from here: by its place below, as in an environment that is not activated, or by name."""
    here = Path.cwd()
    return str(program.relative_to(here)) if program.is_relative_to(here) else program.name


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it was raised from, and so on down to the first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = _wrapped(link) or link.__cause__


def _wrapped(error: BaseException) -> BaseException | None:
    """Return the exception that an exception of Ray's wraps; None for any other. Of several workers, the first rank."""
    failures = getattr(error, "worker_failures", None)  # Ray Train's
    if failures:
        return failures[min(failures)]
    found = (getattr(error, name, None) for name in ("cause", "_base_exc", "controller_failure"))
    return next((inner for inner in found if isinstance(inner, BaseException)), None)


def _told(chain: list[BaseException]) -> tuple[str, list[str]]:
    """Error and notes out of the text of a failed Ray Data task, which does not keep the exception itself."""
    if type(chain[-1]).__name__ != "UserCodeException" or len(chain) < 2:
        return "", []
    first = _remote_trace(chain[-2]).partition(CAUSED)[0].strip().splitlines()
    frames = [i for i, line in enumerate(first) if line.startswith("  ")]
    told = first[frames[-1] + 1 :] if frames else first
    notes = [line for line in told if line.startswith(NOTES)]
    lines = [line for line in told if line not in notes]
    kind, colon, message = "\n".join(lines).partition(": ")
    return f"{kind.rpartition('.')[2]}{colon}{message}", notes


def _remote_trace(error: BaseException) -> str:
    """The traceback of another process that an exception of Ray's carries as text."""
    own = getattr(error, "_traceback_str", None)  # Ray Train's
    return own if isinstance(own, str) else str(error) if type(error).__name__.startswith("RayTaskError") else ""


def _rank(error: BaseException) -> list[str]:
    failures = getattr(error, "worker_failures", None)
    return [f"training worker {min(failures)} (rank)"] if failures else []


def _first_lines(text: str) -> str:
    lines = text.strip().splitlines()
    return "\n".join(lines if len(lines) <= ERROR_LINES else [*lines[:ERROR_LINES], "..."])


def _code(chain: list[BaseException]) -> list[str]:
    """The last frames of this project's own code, in whichever process; else simply the last ones."""
    texts = [_remote_trace(link) for link in chain]
    texts += ["".join(traceback.format_tb(link.__traceback__)) for link in chain]
    frames = list(dict.fromkeys(match for text in texts[::-1] for match in FRAME.findall(text)))
    own = [frame for frame in frames if "/site-packages/" not in frame[0] and "/lib/python" not in frame[0]]
    kept = (own or frames)[-FRAMES:]
    return [f"{Path(*Path(file).parts[-3:])}:{line} in {name}: {source.strip()}" for file, line, name, source in kept]


def _log_lines(chain: list[BaseException]) -> list[str]:
    """What a failed process of this node last wrote to its standard error."""
    pids = [pid for link in chain for pid in PID.findall(str(link))]
    ray = sys.modules.get("ray")
    if not pids or ray is None or not ray.is_initialized():
        return []
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    for file in (file for pid in dict.fromkeys(pids) for file in logs.glob(f"worker-*-{pid}.err")):
        lines = [line for line in file.read_text(errors="replace").splitlines() if line and not line.startswith(":")]
        return lines[-LOG_LINES:]
    return []


def _advice(cause: BaseException) -> str:
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return "make room on the disk; spo-ray plan says how much a run takes"
    if TOO_SLOW in str(cause):
        return "the machine is too busy to start Ray's processes in time: run the same command when it is quieter"
    kinds = (kind.__name__ for kind in type(cause).__mro__)
    return next((ADVICE[kind] for kind in kinds if kind in ADVICE), "")


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


def cause_of(error: BaseException) -> BaseException:
    """Return the exception that a worker's code raised, without the exceptions that Ray wraps around it."""
    inner = _wrapped(error)
    return error if inner is None else cause_of(inner)
