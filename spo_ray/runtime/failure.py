"""Failure cards: the error without what Ray wraps around it, where it happened and what to do."""

import re
import shlex
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spo_ray.errors import UserError
from spo_ray.runtime.console import redact, visible

FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.+)')
PID = re.compile(r"pid[=:]\s*(\d+)")
CAUSED = "The above exception was the direct cause"
"""Separates the tracebacks of an exception chain, which are listed with the first error first."""
NOTES = ("row ", "shard ")
"""Beginnings of the notes that :mod:`spo_ray.runtime.map_rows` adds to exceptions."""
MAX_FRAMES, MAX_LOG_LINES, MAX_ERROR_LINES = 3, 5, 12
AGAIN = "finished stages are kept: the same command resumes the run"
ADVICE = {
    "OutOfMemoryError": "lower train.pairs_per_backward, train.max_length or engine.arguments' gpu_memory_utilization, "
    "or set train.gradient_checkpointing=true: spo-ray plan shows what a training needs",
    "OutOfDiskError": "make room where Ray keeps its objects (--temp-dir of ray start), then run the same command",
    "ObjectStoreFullError": "start Ray with more --object-store-memory",
    "ActorDiedError": "a process was killed, often for its memory: look at the node's kernel log, and lower "
    "engine.memory_gib, engine.replicas or train.num_workers",
    "WorkerCrashedError": "a process was killed, often for its memory: look at the node's kernel log",
    "NodeDiedError": "bring the node back, or lower train.num_workers; the same command resumes the run",
    "RuntimeEnvSetupError": "keep the working directory small (.rayignore), and the packages installed on all nodes",
    "JobDiedError": "a process was killed, often for its memory, or Ray's own processes were lost: look at the node's "
    "kernel log, and at Ray's in /tmp/ray/session_latest/logs",
    "AuthenticationError": "export RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token on every node",
    "ModuleNotFoundError": "install it on every node: spo-ray doctor compares them",
}
"""What to try, by the error's class or a base class of it."""
TOO_SLOW = "node timed out during startup"
"""Part of Ray's message when a node took too long to start."""
EMPTY_CAUSE = "SystemException"
"""Class without a message that Ray Data makes the cause of errors that are not of a task's own code."""
NO_SPACE = "No space left on device"


@dataclass(frozen=True)
class Card:
    """Facts about a failure that a user needs; without secrets."""

    error: str
    """Class and message of the error."""
    stages: list[str]
    """Stages that were running."""
    where: list[str]
    """Row, shard or training worker, where known."""
    code: list[str]
    """Innermost places in the source, as FILE:LINE in FUNCTION: CODE."""
    log: list[str]
    """Last lines that the failed process wrote to stderr."""
    advice: str
    """What to try; empty if unknown."""
    command: str = ""
    """The command line that resumes the run."""
    details: str = field(default="", compare=False)
    """File with the whole traceback."""

    def text(self) -> str:
        """Return the card for a terminal."""
        rows = [("stage", ", ".join(self.stages)), ("where", "; ".join(self.where))]
        rows += [("code", line) for line in self.code] + [("log", line) for line in self.log]
        rows += [("details", self.details), ("try", self.advice), ("then", f"{AGAIN}\n{'':10}{self.command}".rstrip())]
        return "\n".join([f"error: {self.error}", *(f"  {head:<7} {value}" for head, value in rows if value)])


def card_of(error: BaseException, stages: list[str] | None = None, details: str = "") -> Card:
    """Return the card of an exception; ``details`` names the file with its traceback."""
    chain = list(_chain(error))
    cause = chain[-1]
    expected = isinstance(cause, UserError)
    message, notes = _from_data_task(chain)
    where = [note for link in chain for note in (*_rank(link), *getattr(link, "__notes__", []))] + notes
    return Card(
        redact(message or ("" if expected else f"{type(cause).__name__}: ") + _first_lines(visible(str(cause)))),
        list(stages or []),
        [redact(note) for note in dict.fromkeys(where)],
        [] if expected else [redact(line) for line in _code(chain)],
        [redact(line) for line in _log_lines(chain)],
        _advice(cause),
        command_line(),
        details,
    )


def command_line() -> str:
    """Return this process's command line as it can be typed again, without secrets."""
    program = Path(sys.argv[0])
    head = [_typed(Path(sys.executable)), str(program)] if program.suffix == ".py" else [_typed(program)]
    return redact(shlex.join([*head, *sys.argv[1:]]))


def _typed(program: Path) -> str:
    """Return a program's relative path if it is below the working directory, as in an inactive venv, else its name."""
    here = Path.cwd()
    return str(program.relative_to(here)) if program.is_relative_to(here) else program.name


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, the one that it was raised from, and so on to the first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        link = _wrapped(link) or link.__cause__
        if type(link).__name__ == EMPTY_CAUSE:
            return


def _wrapped(error: BaseException) -> BaseException | None:
    """Return the exception that an exception of Ray's wraps; None for any other. Of several workers, the first rank."""
    failures = getattr(error, "worker_failures", None)  # Ray Train's
    if failures:
        return failures[min(failures)]
    found = (getattr(error, name, None) for name in ("cause", "_base_exc", "controller_failure"))
    return next((inner for inner in found if isinstance(inner, BaseException)), None)


def _from_data_task(chain: list[BaseException]) -> tuple[str, list[str]]:
    """Return error and notes from the text of a failed Ray Data task, which keeps no exception; empty for others."""
    if type(chain[-1]).__name__ != "UserCodeException" or len(chain) < 2:
        return "", []
    first = _remote_trace(chain[-2]).partition(CAUSED)[0].strip().splitlines()
    frames = [i for i, line in enumerate(first) if line.startswith("  ")]
    message = first[frames[-1] + 1 :] if frames else first
    notes = [line for line in message if line.startswith(NOTES)]
    kind, colon, text = "\n".join(line for line in message if line not in notes).partition(": ")
    return f"{kind.rpartition('.')[2]}{colon}{text}", notes


def _remote_trace(error: BaseException) -> str:
    """Return the traceback of another process that an exception of Ray's carries as text, or an empty string."""
    own = getattr(error, "_traceback_str", None)  # Ray Train's
    return own if isinstance(own, str) else str(error) if type(error).__name__.startswith("RayTaskError") else ""


def _rank(error: BaseException) -> list[str]:
    failures = getattr(error, "worker_failures", None)  # Ray Train's
    return [f"training worker {min(failures)} (rank)"] if failures else []


def _first_lines(text: str) -> str:
    lines = text.strip().splitlines()
    return "\n".join(lines if len(lines) <= MAX_ERROR_LINES else [*lines[:MAX_ERROR_LINES], "..."])


def _code(chain: list[BaseException]) -> list[str]:
    """Return the last frames of this project's code in any process; if there are none, the last frames."""
    texts = [_remote_trace(link) for link in chain]
    texts += ["".join(traceback.format_tb(link.__traceback__)) for link in chain]
    frames = list(dict.fromkeys(match for text in texts[::-1] for match in FRAME.findall(text)))
    own = [frame for frame in frames if "/site-packages/" not in frame[0] and "/lib/python" not in frame[0]]
    kept = (own or frames)[-MAX_FRAMES:]
    return [f"{Path(*Path(file).parts[-3:])}:{line} in {name}: {source.strip()}" for file, line, name, source in kept]


def _log_lines(chain: list[BaseException]) -> list[str]:
    """Return the last lines that a failed process of this node wrote to stderr."""
    pids = [pid for link in chain for pid in PID.findall(str(link))]
    ray = sys.modules.get("ray")
    if not pids or ray is None or not ray.is_initialized():
        return []
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    for file in (file for pid in dict.fromkeys(pids) for file in logs.glob(f"worker-*-{pid}.err")):
        lines = [line for line in file.read_text(errors="replace").splitlines() if line and not line.startswith(":")]
        return lines[-MAX_LOG_LINES:]
    return []


def _advice(cause: BaseException) -> str:
    if NO_SPACE in str(cause):
        return "free space on the disk; spo-ray plan shows how much a run takes"
    if TOO_SLOW in str(cause):
        return "the machine is too busy: run the same command when it is quieter, or raise ray.start_timeout_s"
    kinds = (kind.__name__ for kind in type(cause).__mro__)
    return next((ADVICE[kind] for kind in kinds if kind in ADVICE), "")


def cause_of(error: BaseException) -> BaseException:
    """Return the exception that a worker's code raised, without the exceptions that Ray wraps around it."""
    inner = _wrapped(error)
    return error if inner is None else cause_of(inner)
