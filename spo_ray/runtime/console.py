"""Log records of the logger ``spo_ray`` as lines or JSON, progress bars on a terminal, and quiet libraries."""

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from spo_ray.config.base import is_secret

LOGGER = logging.getLogger("spo_ray")
EVERY_S = 60.0
"""Seconds between two progress lines of a stage, where there are no bars."""
NOISY = (
    "torchao",
    "torch.utils._pytree",
    "transformers",
    "datasets",
    "httpx",
    "ray.data",
    "ray._private.authentication",
)
"""Loggers of libraries that are silenced below ERROR unless the user asks for their messages."""
MIN_SECRET = 6
"""Fewest characters of a secret; shorter values occur in ordinary words."""
IN_ADDRESS = re.compile(r"(?<=://)[^/\s:@]*:(?!\d+/)[^\s@]+(?=@)")
"""User and password in a URL; a port number is followed by a slash."""
KNOWN = re.compile(r"\b(hf_|sk-|ghp_|AKIA)[A-Za-z0-9_-]{12,}")
"""Tokens of Hugging Face, OpenAI, GitHub and AWS."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that act on a terminal instead of being shown: all controls but tabs and line feeds, marks that turn the
direction of writing, separators of lines, and surrogates, which no encoding has."""
UNITS = {
    "count": ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")),
    "bytes": ((2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB")),
    "seconds": ((3600.0, " h"), (60.0, " min"), (1.0, " s")),
}
"""Units of counts, bytes and seconds, each with its size."""
Update = Callable[[int, int, str], None]
"""Reports progress: (done, total, text)."""


def log(stage: str, text: str) -> None:
    """Log one line of a stage's progress at level INFO."""
    LOGGER.info(text, extra={"stage": stage})


def warn(stage: str, text: str) -> None:
    """Log one line about a stage at level WARNING, which ``--quiet`` shows too."""
    LOGGER.warning(text, extra={"stage": stage})


def in_units(value: float | None, kind: str) -> str:
    """Return a value in its largest unit of ``UNITS[kind]``; an empty text for 0 and None."""
    if not value:
        return ""
    size, unit = next(((s, u) for s, u in UNITS[kind] if value >= s), UNITS[kind][-1])
    return f"{value / size:.0f}{unit}" if unit == "" else f"{value / size:.1f}{unit}"


def redact(text: str) -> str:
    """Return the text without the secrets of this process's environment, and without what looks like one."""
    secrets = {value: name for name, value in os.environ.items() if is_secret(name) and len(value) >= MIN_SECRET}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, f"[{secrets[value]}]")
    return KNOWN.sub("[secret]", IN_ADDRESS.sub("[secret]", text))


def visible(text: str) -> str:
    """Return the text with its control characters spelled out, ``\\x1b`` for escape: data may hold any of them."""
    return CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def show(text: str, error: bool = False) -> None:
    """Print a command's answer to stdout, or to stderr; without secrets, and with control characters spelled out."""
    print(visible(redact(text)), file=sys.stderr if error else sys.stdout, flush=True)


class _Redact(logging.Filter):
    """Replaces the secrets in a record before any formatter sees it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        record.stage = redact(getattr(record, "stage", ""))
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True


class _Plain(logging.Formatter):
    """Formats ``[HH:MM:SS] stage: text``, or the text alone for a record without a stage."""

    def format(self, record: logging.LogRecord) -> str:
        text, stage = super().format(record), getattr(record, "stage", "")
        return visible(f"[{self.formatTime(record, '%H:%M:%S')}] {stage}: {text}" if stage else text)


class _Json(logging.Formatter):
    """Formats one JSON object per record: time (ISO 8601), level, stage (null if none), message."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "stage": getattr(record, "stage", "") or None,
            "message": super().format(record),
        }
        return json.dumps(fields)


def _text(template: str, **options: Any) -> TextColumn:
    return TextColumn(template, markup=False, table_column=Column(no_wrap=True, **options))


class _Left(TimeRemainingColumn):
    """The time that is left, with the word behind it; empty while it is unknown."""

    def render(self, task: Task) -> Text:
        """See :class:`rich.progress.TimeRemainingColumn`."""
        found = super().render(task)
        return found.append(" left") if found.plain.strip("-:") else Text()


class _Bars:
    """Progress bars of the stages under way, shown as long as there is one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.terminal: Console | None = None
        """None: no bars."""
        self.progress: Progress | None = None
        """None: no stage is under way."""

    @contextmanager
    def bar(self, stage: str, terminal: Console) -> Generator[Update]:
        """Show one stage's bar while the block runs."""
        with self.lock:
            if self.progress is None:
                text = _text("{task.fields[text]}", ratio=1, overflow="ellipsis")  # cut before names and times are
                columns = (_text("{task.description}"), BarColumn(20), text, TimeElapsedColumn(), _Left())
                self.progress = Progress(*columns, console=terminal, transient=True, expand=True)
                self.progress.start()
            shown = self.progress
            task = shown.add_task(stage, total=None, text="")
        try:
            yield lambda done, total, text: shown.update(task, completed=done, total=total, text=visible(text))
        finally:
            with self.lock:
                shown.remove_task(task)
                if not shown.task_ids:
                    self.end()

    def end(self) -> None:
        """Give the terminal back, whatever is under way."""
        with self.lock:
            shown, self.progress = self.progress, None
            if shown is not None:
                shown.stop()


_bars = _Bars()


class _Handler(logging.Handler):
    """Writes records to stdout and errors to stderr; JSON goes to stderr, so that stdout holds only the answer."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json
        self.setFormatter(_Json() if as_json else _Plain())
        self.addFilter(_Redact())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.levelno >= logging.ERROR:
                _bars.end()
            shown, line = _bars.progress, self.format(record)
            if shown is not None:
                shown.console.out(line, highlight=False)
            else:
                to_stderr = self.as_json or record.levelno >= logging.ERROR
                print(line, file=sys.stderr if to_stderr else sys.stdout, flush=True)
        except Exception:
            self.handleError(record)


def install(quiet: bool = False, as_json: bool = False) -> None:
    """Write this process's log records to the terminal, and replace earlier handlers.

    Command lines and the processes of sweep trials call this. A program that only imports spo_ray configures
    ``logging.getLogger("spo_ray")`` itself.

    Args:
        quiet: write warnings and errors only, and show no bars.
        as_json: write JSON lines to stderr, and show no bars.
    """
    terminal = Console()
    _bars.terminal = terminal if terminal.is_interactive and not (quiet or as_json) else None
    LOGGER.handlers[:] = [_Handler(as_json)]
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
    LOGGER.propagate = False


@contextmanager
def installed(quiet: bool = False, as_json: bool = False) -> Generator[None]:
    """Write log records to the terminal while the block runs; see :func:`install`."""
    handlers, level, propagate = LOGGER.handlers[:], LOGGER.level, LOGGER.propagate
    install(quiet, as_json)
    try:
        yield
    finally:
        _bars.end()
        _bars.terminal = None
        LOGGER.handlers[:], LOGGER.propagate = handlers, propagate
        LOGGER.setLevel(level)


@contextmanager
def progress(stage: str) -> Generator[Update]:
    """Show how far a stage is and how much time is left: a bar on a terminal, elsewhere a log line a minute."""
    first, began = 0, time.monotonic()
    last = began

    def line(done: int, total: int, text: str) -> None:
        nonlocal first, began, last
        now = time.monotonic()
        if not first:  # earlier ones are not counted: engines start, and a resumed stage has some already
            first, began = done, now
        if now - last > EVERY_S and done < total:
            left = (now - began) / (done - first) * (total - done) if done > first else None
            log(stage, text if left is None else f"{text}, about {timedelta(seconds=round(left))} left")
            last = now

    if _bars.terminal is None:
        yield line
    else:
        with _bars.bar(stage, _bars.terminal) as update:
            yield update


def set_verbosity(verbose: bool) -> None:
    """Show all messages of libraries, or their errors only. Must be called before they are imported."""
    quieten(logging.NOTSET if verbose else logging.ERROR)
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if verbose else "ERROR")


def quieten(level: int = logging.ERROR) -> None:
    """Silence the messages of libraries below a level."""
    for name in NOISY:
        logging.getLogger(name).setLevel(level)


def prepare_process() -> None:
    """Silence libraries; open the standard streams that this process was started without.

    Else a file would take such a stream's number, and what native code prints would be written into it.

    Raises:
        SystemExit: Python removes docstrings, without which Ray can't be imported.
    """
    quieten()
    for name in ("stdin", "stdout", "stderr"):  # the lowest free number is the first one's
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    if sys.flags.optimize > 1:
        sys.exit("error: Ray can't be imported without docstrings: unset PYTHONOPTIMIZE, or leave -OO out")


def place(path: Path) -> str:
    """Return a path relative to the working directory if it is below it, else the absolute path."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
