"""A job's command as two processes: the job in a child, and a supervisor that waits for its end.

Ray ends the process that uses it in many ways: by signals, by ``abort`` where its own processes are lost, by an exit
code of its own. The supervisor uses no Ray, so that it is there to say how the job ended. It passes stop signals on as
Ctrl-C, and keeps from the terminal what native code writes there.
"""

import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn

POLL_S = 0.05
GRACE_S = 60.0
"""Seconds until a job is killed that was told to stop, or that has said how it ended."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; what schedulers send; what a terminal sends when it is closed."""
PR_SET_PDEATHSIG = 1
NATIVE_LINES = 40
"""Last lines of native output that are kept."""
_pipe: int | None = None
"""Descriptor by which a job's process reports to its supervisor; None: there is no supervisor."""


@dataclass
class Ending:
    """The end of a job's process, as its supervisor saw it."""

    pid: int
    told: dict[str, Any] = field(default_factory=dict)
    """Facts that the process reported with :func:`tell`; ``code``, its exit code, if it got that far."""
    stopped_by: str = ""
    """Signal that the supervisor was stopped by; empty: none."""
    returncode: int = 0
    """Exit code, or the negative number of the signal that ended the process."""
    native: list[str] = field(default_factory=list)
    """Last lines that native code wrote."""


def tell(**facts: Any) -> None:
    """Report facts to the supervisor of this process, if it has one."""
    if _pipe is not None:
        os.write(_pipe, json.dumps(facts).encode() + b"\n")


def supervise(work: Callable[[], int], verbose: bool = False) -> Ending:
    """Run ``work`` in a child process and return how that ended; call it before Ray or PyTorch are imported.

    The child has a process group of its own: Ctrl-C of a terminal reaches it once, through this process. It is killed
    if this process is.

    Args:
        work: returns the exit code.
        verbose: let what native code writes through to the terminal.
    """
    with tempfile.TemporaryFile() as native:
        ending = _fork(work, None if verbose else native)
        native.seek(0)
        ending.native = native.read().decode(errors="replace").splitlines()[-NATIVE_LINES:]
    return ending


def _fork(work: Callable[[], int], native: IO[bytes] | None) -> Ending:
    reports, pipe = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        os.close(reports)
        _be_child(parent, pipe, native, work)
    os.close(pipe)
    os.set_blocking(reports, False)
    ending = Ending(pid)
    before = _forward_signals(ending)
    try:
        _wait(ending, reports)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reports)
    return ending


def _be_child(parent: int, pipe: int, native: IO[bytes] | None, work: Callable[[], int]) -> NoReturn:
    """Do the work in the child; exit with its code after reporting it."""
    global _pipe
    _pipe = pipe
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed in between
        os._exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for background processes
    if sys.stdin is not None and sys.stdin.isatty():  # reading it would stop a background process
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if native is not None:
        _keep_native(native)
    try:
        code = work()
    except SystemExit as error:  # of a mistyped command line
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    tell(code=code)
    sys.exit(code)


def _keep_native(file: IO[bytes]) -> None:
    """Send what is not written through Python's streams, as by Ray's C++ code, to a file."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        ours = os.fdopen(os.dup(number), "w", buffering=1, encoding=getattr(sys, name).encoding, errors="replace")
        setattr(sys, name, ours)
        os.dup2(file.fileno(), number)


def _forward_signals(ending: Ending) -> dict[int, Any]:
    """Pass stop signals on to the child as Ctrl-C, unless they are ignored here (``nohup``); return old handlers."""

    def stop(number: int, frame: object) -> None:
        ending.stopped_by = signal.Signals(number).name
        os.kill(ending.pid, signal.SIGINT)

    def pause(number: int, frame: object) -> None:
        os.killpg(ending.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.killpg(ending.pid, signal.SIGCONT)

    handlers = dict.fromkeys(STOPPING, stop) | {signal.SIGTSTP: pause}
    heard = {n: handler for n, handler in handlers.items() if signal.getsignal(n) != signal.SIG_IGN}
    return {number: signal.signal(number, handler) for number, handler in heard.items()}


def _wait(ending: Ending, reports: int) -> None:
    """Wait for the child's end; kill it if it does not end although it should."""
    text, limit = b"", None
    while True:
        done, status = os.waitpid(ending.pid, os.WNOHANG)
        with suppress(BlockingIOError):
            text += os.read(reports, 2**16)
        *lines, text = text.split(b"\n")
        for line in lines:
            ending.told |= json.loads(line)
        if done:
            ending.returncode = os.waitstatus_to_exitcode(status)
            return
        if limit is None and ("code" in ending.told or ending.stopped_by):
            limit = time.monotonic() + GRACE_S
        if limit is not None and time.monotonic() > limit:
            os.kill(ending.pid, signal.SIGKILL)
        time.sleep(POLL_S)
