"""Jobs without Ray whose processes end as a test wants them to, run as the command line runs them.

python -m tests.runtime.supervised OUTPUT END ...

Each runs in OUTPUT/END; of several, each writes there into the files ``out``, ``err`` and ``code``.
"""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from spo_ray.errors import UserError
from spo_ray.pipeline.cli import execute, guarded, supervised
from spo_ray.runtime.run import Run, Stage

from ..helpers import small_config


def wait() -> None:
    print("waiting", flush=True)
    time.sleep(600)


def deaf() -> None:
    """A stop signal that the job does not react to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wait()


def refuse() -> None:
    raise UserError("set x")


def fail() -> None:
    raise ValueError("seven")


def abort() -> None:
    os.write(2, b"RAY_LOG(FATAL): no connection to GCS\n")
    ctypes.CDLL(None).abort()


def fill() -> None:
    with Path(sys.argv[1], "filler").open("wb", buffering=0) as file:
        for size in (4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
        file.write(b"0")


ENDS = {
    "fill": fill,
    "finish": lambda: None,
    "wait": wait,
    "deaf": deaf,
    "refuse": refuse,
    "fail": fail,
    "abort": abort,
}
ENDS |= {"exit": lambda: os._exit(1), "kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "late": lambda: None}


def work(words: list[str]) -> int:
    output, end = words

    def job(run: Run) -> None:
        run.execute(Stage("s", lambda out, counts: ENDS[end]()))

    def late() -> None:
        execute(job, small_config(output))
        abort()  # as Ray does that loses its GCS when all is done

    return guarded(late if end == "late" else lambda: execute(job, small_config(output)))


def main(output: str, *ends: str) -> int:
    code = 0
    for end in ends:
        folder = Path(output, end)
        folder.mkdir(exist_ok=True)
        for number, name in {1: "out", 2: "err"}.items() if len(ends) > 1 else ():
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
        code = supervised(work, [str(folder), end])
        (folder / "code").write_text(str(code))
    return code


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    sys.exit(main(*sys.argv[1:]))
