"""What people see while a run works: a live view on a terminal, plain lines elsewhere; and quiet libraries."""

import atexit
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spo_ray.config.base import is_secret

EVERY_S = 2.0
"""Between two plain lines of a stage."""
NOISY = (
    "torchao",
    "torch.utils._pytree",
    "transformers",
    "datasets",
    "httpx",
    "ray.data",
    "ray._private.authentication",
)
Update = Callable[[int, int, str], None]
"""(done, total, text)."""


class _View:
    """The bars of all stages that are under way, which are shown as long as there are any."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.progress: Progress | None = None
        self.open = 0

    def add(self, stage: str) -> tuple[Progress, int]:
        with self.lock:
            if self.progress is None:
                columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[text]}"))
                times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
                self.progress = Progress(*columns, *times, console=Console(file=sys.stdout), transient=True)
                self.progress.start()
            self.open += 1
            return self.progress, self.progress.add_task(stage, total=None, text="")

    def drop(self, task: int) -> None:
        with self.lock:
            if self.progress is not None:
                self.progress.remove_task(task)  # ty: ignore[invalid-argument-type]
                self.open -= 1
        if not self.open:
            self.end()

    def end(self) -> None:
        with self.lock:
            shown, self.progress, self.open = self.progress, None, 0
            if shown is not None:
                shown.stop()


_view = _View()


def log(stage: str, text: str) -> None:
    """One line of progress, without secrets."""
    line = f"[{time.strftime('%H:%M:%S')}] {stage}: {redact(text)}"
    shown = _view.progress
    if shown is None:
        print(line, flush=True)
    else:
        shown.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(stage: str) -> Generator[Update]:
    """How far a stage is: a bar with its text where there is a terminal, else the text every few seconds."""
    last = time.monotonic()

    def plain(done: int, total: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > EVERY_S and done < total:
            log(stage, text)
            last = time.monotonic()

    if not Console(file=sys.stdout).is_interactive:
        yield plain
        return
    bars, task = _view.add(stage)

    def live(done: int, total: int, text: str) -> None:
        bars.update(task, completed=done, total=total, text=text)  # ty: ignore[invalid-argument-type]

    try:
        yield live
    finally:
        _view.drop(task)


def end_view() -> None:
    """Give the terminal back, whatever is under way."""
    _view.end()


atexit.register(end_view)


def set_verbosity(verbose: bool) -> None:
    """Let libraries tell all, or errors alone. To be called before they are imported."""
    quieten(logging.NOTSET if verbose else logging.ERROR)
    if verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def quieten(level: int = logging.ERROR) -> None:
    """Keep libraries' messages below a level to themselves."""
    for name in NOISY:
        logging.getLogger(name).setLevel(level)


def place(path: Path) -> str:
    """A path to look up: relative to where the command was given, if it is below."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


SHORTEST = 6
"""A shorter value is no secret, and would be struck out of innocent words."""
IN_ADDRESS = re.compile(r"(?<=://)[^/\s:@]*:(?!\d+/)[^\s@]+(?=@)")
"""User and password; a port ends at a slash."""
KNOWN = re.compile(r"\b(hf_|sk-|ghp_|AKIA)[A-Za-z0-9_-]{12,}")
"""Hugging Face, OpenAI, GitHub, AWS."""


def redact(text: str) -> str:
    """The text without the secrets of this process's environment, and without what looks like one."""
    secrets = {value: name for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, f"[{secrets[value]}]")
    return KNOWN.sub("[secret]", IN_ADDRESS.sub("[secret]", text))
