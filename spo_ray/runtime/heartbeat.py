"""Notices processes that stand still: stopped by a signal, or stuck in a call, on any node.

A process that holds an engine, a shard or a training rank touches a file every few seconds, from a thread of its own.
The driver watches these files: it warns of a process that has not touched its file for a minute, and ends it after two.
Ray starts it again as one that died. A process whose call takes longer than its limit ends itself.

On its own node the driver also sees Ray's processes and those that have no file yet, if a signal has stopped them.
"""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from spo_ray.runtime.artifact import make_way
from spo_ray.runtime.console import warn

BEAT_S = 5.0
STILL_S = 60.0
"""Seconds without a sign of life until the user is warned."""
LOST_S = 120.0
"""Seconds without a sign of life until the process is ended."""
NODE_S = 30.0
"""Seconds until another node must have answered."""
BEATS = ".beats"
"""Name of the folder of the files."""
_watched: Path | None = None
"""Folder of the files that this process watches; None: it watches none."""


def watched() -> Path | None:
    """Return the folder for the files of processes that this process starts, or None if nobody watches them."""
    return _watched


def report_to(folder: Path | None) -> None:
    """Let another process, which watches a folder, watch the processes that this one starts."""
    global _watched
    _watched = folder


class Heartbeat:
    """Sign of life of the process that makes it.

    Args:
        folder: folder from :func:`watched`; None: nobody watches.
        what: name of the process in warnings.
        limit: longest time of a call in seconds; None: no limit.
    """

    def __init__(self, folder: Path | None, what: str, limit: float | None = None) -> None:
        self.limit, self.ended = limit, threading.Event()
        self.since: float | None = None  # when the call under way began
        self.file = folder / f"{uuid.uuid4().hex}.json" if folder is not None and folder.is_dir() else None
        if self.file is not None:
            self.file.write_text(json.dumps({"what": what, **_this_process()}))
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_S):
            if self.file is not None:
                with suppress(OSError):
                    os.utime(self.file)
            if self.limit is not None and self.since is not None and time.monotonic() - self.since > self.limit:
                print(f"a call took longer than its limit of {self.limit:g} s: this process ends", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def call(self) -> Generator[None]:
        """Count the time of a call towards the limit."""
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def end(self) -> None:
        """Give no more signs of life, and delete the file."""
        self.ended.set()
        if self.file is not None:
            self.file.unlink(missing_ok=True)


@contextmanager
def beating(folder: Path | None, what: str, limit: float | None = None) -> Generator[None]:
    """Give signs of life while the block runs, which is one call."""
    heartbeat = Heartbeat(folder, what, limit)
    try:
        with heartbeat.call():
            yield
    finally:
        heartbeat.end()


def _this_process() -> dict[str, Any]:
    ray = sys.modules.get("ray")
    node = ray.get_runtime_context().get_node_id() if ray is not None and ray.is_initialized() else ""
    started = psutil.Process().create_time()
    return {"pid": os.getpid(), "started": started, "host": socket.gethostname(), "node": node}


class _Seen(NamedTuple):
    """Last sign of life of a process, as the watching process saw it."""

    touched: int
    """Time of the file in ns, which only is compared with itself: clocks of nodes differ."""
    at: float
    """Seconds that the watching process had run by then."""


class Watch:
    """Watches the files of a folder while its block runs.

    Args:
        folder: the folder, which is made.
        changed: called with the names of the processes that stand still when others do than before.
    """

    def __init__(self, folder: Path, changed: Callable[[list[str]], None] = lambda names: None) -> None:
        self.folder, self.changed, self.ended = folder, changed, threading.Event()
        self.ran = 0.0
        """Seconds that this process has run: if it is stopped together with those that it watches, no time passes."""
        self.seen: dict[Path, _Seen] = {}
        self.stopped: dict[psutil.Process, float] = {}
        """Processes of this one that a signal has stopped, and since when."""
        self.still: dict[Path | psutil.Process, str] = {}

    def __enter__(self) -> None:
        make_way(self.folder)  # of a driver that was killed
        self.folder.mkdir(mode=0o700)
        report_to(self.folder)
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *error: object) -> None:
        report_to(None)
        self.ended.set()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self.ended.wait(BEAT_S):
            now = time.monotonic()
            self.ran, last = self.ran + min(now - last, 3 * BEAT_S), now
            before, files = list(self.still.values()), set()
            for file in self.folder.glob("*.json"):
                with suppress(OSError, ValueError, KeyError):
                    files.add(self._look(file, self.ran))
            self._look_at_stopped(files, self.ran)
            self.still = {
                k: name for k, name in self.still.items() if k in self.stopped or (isinstance(k, Path) and k.exists())
            }
            if list(self.still.values()) != before:
                self.changed(list(self.still.values()))

    def _look_at_stopped(self, files: set[int], now: float) -> None:
        """Notice stopped processes that have no file."""
        found = {}
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if child.pid not in files and child.status() == psutil.STATUS_STOPPED:
                    found[child] = self.stopped.get(child, now)
                    self._judge(child, f"{child.name()} (process {child.pid})", now - found[child], child.kill)
        self.stopped = found

    def _look(self, file: Path, now: float) -> int:
        """Look at a process's file; return the id of the process if it is on this node, else 0."""
        with file.open() as opened:  # opening it makes a network file system look again
            touched = os.fstat(opened.fileno()).st_mtime_ns
            process = json.load(opened)
        last = self.seen.get(file)
        if last is None or last.touched != touched:
            if self.still.pop(file, None):
                warn("job", f"{_name(process)} responds again")
            self.seen[file] = _Seen(touched, now)
        elif now - last.at > STILL_S and not _on_its_node(_exists, process):
            file.unlink()  # it ended, or was ended by Ray, without a word
        else:
            self._judge(file, _name(process), now - last.at, lambda: _on_its_node(_kill, process))
        return process["pid"] if process["host"] == socket.gethostname() else 0

    def _judge(self, key: Path | psutil.Process, name: str, seconds: float, end: Callable[[], Any]) -> None:
        """Warn of a process that has stood still for some time, or end it."""
        if seconds > LOST_S:
            if isinstance(key, Path):
                key.unlink()
            warn("job", f"{name} is stopped; if Ray can restart it, its work is repeated")
            end()
        elif seconds > STILL_S and key not in self.still:
            self.still[key] = name
            warn("job", f"{name} has given no sign of life for {STILL_S:g} s")


def _name(process: dict[str, Any]) -> str:
    return f"{process['what']} (process {process['pid']} on {process['host']})"


def _on_its_node(function: Callable[[int, float], bool], process: dict[str, Any]) -> bool:
    """Call a function of id and start time where a process is; return its result, False if the node can't be asked."""
    arguments = process["pid"], process["started"]
    if process["host"] == socket.gethostname():
        return function(*arguments)
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    there = there.options(scheduling_strategy=NodeAffinitySchedulingStrategy(process["node"], soft=False))
    with suppress(RayError):
        return bool(ray.get(there.remote(*arguments), timeout=NODE_S))
    return False


def _exists(pid: int, started: float) -> bool:
    """Return True if there is a process that started at that time; another one may have got its id."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1.0
    return False


def _kill(pid: int, started: float) -> bool:
    """Kill a process if it started at that time; return False if there is none."""
    with suppress(psutil.Error):
        if _exists(pid, started):
            psutil.Process(pid).kill()
            return True
    return False
