"""The faults of the soak test, as a table: what happens to whom, and when."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

PARTS = {
    "sample": ("base_samples", "base_scores"),
    "train": ("method_dpo", "method_spo"),
    "evaluate": tuple(f"{stage}_{name}" for stage in ("eval", "health", "alpaca") for name in ("dpo", "spo")),
}
"""Stages that are made while a fault happens, by the part of the job; the others are there already."""
DATA = {"sample": "base_samples/part-00002.parquet", "train": "method_spo/model.safetensors"}
DATA |= {"evaluate": "eval_spo/part-0.parquet"}
NOTES = {"sample": "base_samples/manifest.json", "train": "sft/log.jsonl", "evaluate": "pairs/manifest.json"}
"""Files of a finished run that are damaged."""


@dataclass
class Cell:
    """One fault at one moment, and the command that it happens to."""

    folder: Path
    part: str
    server: Any
    """The judge, as in :mod:`tests.chat_server`."""
    process: Any = None
    found: dict[str, Any] = field(default_factory=dict)
    """The command, its environment, and whatever a fault needs for its end."""

    @property
    def output(self) -> Path:
        return self.folder / self.found.get("output", "output")

    @property
    def run(self) -> Path:
        return self.output / "run"

    def processes(self, name: str) -> list[psutil.Process]:
        """Processes of the command whose command line has a name."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    found += [process] if name in " ".join(process.cmdline()) else []
        return found


class Moment(NamedTuple):
    part: str
    due: Callable[[Cell], bool]


def steps(method: str, count: int) -> Moment:
    """When so many steps of a method are logged."""

    def due(cell: Cell) -> bool:
        log = cell.run / ".unfinished" / f"method_{method}" / "log.jsonl"
        return log.exists() and log.read_bytes().count(b"\n") > count

    return Moment("train", due)


def shards(count: int) -> Moment:
    """When so many shards are sampled."""
    pattern = ".unfinished/base_samples/part-*.parquet"
    return Moment("sample", lambda cell: len(list(cell.run.glob(pattern))) >= count)


def began(stage: str) -> Moment:
    """When a stage of the evaluation has begun."""
    return Moment(
        "evaluate", lambda cell: any(f.exists() for f in (cell.run / ".unfinished" / stage, cell.run / stage))
    )


def there(part: str, name: str) -> Moment:
    """When a process is there: in its first seconds."""
    return Moment(part, lambda cell: bool(cell.processes(name)))


def asked(count: int) -> Moment:
    """When the judge was asked so many times."""
    return Moment("evaluate", lambda cell: len(cell.server.requests) >= count)


AT = {"sample": shards(2), "train": steps("spo", 5), "evaluate": began("health_dpo")}
BEFORE = {part: Moment(part, lambda cell: True) for part in PARTS}
SAMPLING = {"first seconds": there("sample", "MapWorker"), "first shard": shards(1), "fifth shard": shards(5)}
TRAINING = {"first step": steps("dpo", 1), "middle": steps("spo", 5), "last step": steps("spo", 10)}
CHECKPOINTS = {"step 4": steps("dpo", 4), "step 8": steps("dpo", 8), "second method": steps("spo", 5)}
EVALUATING = {"first seconds": there("evaluate", "Evaluator"), "first answers": began("eval_dpo")}
EVALUATING |= {"second method": began("health_spo")}
JUDGING = {"first reply": asked(1), "third reply": asked(3), "second method": asked(9)}
WORKERS = {"sample": "MapWorker", "train": "RayTrainWorker", "evaluate": "Evaluator"}
Strike = Callable[[Cell], Any]


@dataclass(frozen=True)
class Fault:
    """One way in which things go wrong."""

    strike: Strike = lambda cell: None
    """Happens while the command runs; if ``damages``, before it, to a finished run."""
    moments: dict[str, Moment] = field(default_factory=lambda: AT)
    around: Callable[[Cell], AbstractContextManager[Sequence[str]]] = lambda cell: nullcontext(())
    """What the first command runs in; it gives words to put before the command."""
    end: Strike = lambda cell: None
    """Ends the fault before the command is given again."""
    damages: bool = False
    engine: str = "transformers"


def hit(name: str, number: int) -> Strike:
    """Send a signal to the newest process of a name, to the command itself (""), or to its child ("job")."""

    def victims(cell: Cell) -> list[psutil.Process]:
        command = psutil.Process(cell.process.pid)
        return command.children()[:1] if name == "job" else cell.processes(name) if name else [command]

    def strike(cell: Cell) -> None:
        while not (found := victims(cell)) and cell.process.poll() is None:  # its stage may have begun without it
            time.sleep(0.02)
        found[-1].send_signal(number)

    return strike


def kill_job(cell: Cell) -> None:
    hit("job", signal.SIGKILL)(cell)
    cell.process.wait()


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_checkpoint(cell: Cell) -> None:
    """The job is killed, and the newest checkpoint's largest file is cut."""
    kill_job(cell)
    files = (cell.run / ".unfinished").glob("train_*/*_step_*/*.distcp")
    cut(max(files, key=lambda file: (file.parent.stat().st_mtime_ns, file.stat().st_size)))


@contextmanager
def mounted(options: str, cell: Cell) -> Iterator[Sequence[str]]:
    """The run's folder is a small file system of its own."""
    kept = cell.output.rename(cell.folder / "kept")
    cell.output.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", cell.output], check=True)
    cell.found["mounted"] = True
    shutil.copytree(kept, cell.output, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", f"remount,{options}", cell.output], check=True)
    yield ()


def fill(cell: Cell) -> None:
    with (cell.output / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def writable(cell: Cell) -> None:
    subprocess.run(["mount", "-o", "remount,rw", cell.output], check=True)
    (cell.output / "filler").unlink(missing_ok=True)


def second(cell: Cell) -> None:
    """The same command again: it is refused, unless the first has ended while it started."""
    done = subprocess.run(cell.found["command"], env=cell.found["env"], capture_output=True, text=True)
    refused = done.returncode == 2 and "another process is working in" in done.stderr
    assert refused or (done.returncode == 0 and cell.process.wait() == 0), done.stderr


def move(cell: Cell) -> None:
    kill_job(cell)
    cell.output.rename(cell.folder / "moved")
    cell.found["output"] = "moved"


def no_memory(cell: Cell) -> None:
    """A process at work gets no more memory than it has."""
    victim = cell.processes(WORKERS[cell.part])[-1]
    victim.rlimit(psutil.RLIMIT_AS, (victim.memory_info().vms,) * 2)


@contextmanager
def occupied(cell: Cell) -> Iterator[Sequence[str]]:
    """Ray's usual ports are another program's; files of a cluster and of a run that were killed lie about."""
    with ExitStack() as stack:
        for port in (6379, 8265, 10001, 52365):
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        ray, beats = Path(cell.found["env"]["RAY_TMPDIR"]) / "ray", cell.run / ".beats"
        ray.mkdir(parents=True)
        (ray / "ray_current_cluster").write_text("127.0.0.1:1")
        (ray / "session_latest").symlink_to(ray / "session_gone")
        beats.mkdir()
        (beats / "x.json").write_text('{"what": "x", "pid": 1, "started": 0, "host": "h", "node": ""}')
        (cell.run / "status.json").write_text('{"state": "running", "pid": 2, "process_started": 1, "host": "h"}')
        yield ()


def silence(cell: Cell) -> None:
    """The judge's server closes every connection, for 20 seconds."""
    answer, until = cell.server.answer, time.monotonic() + 20
    cell.server.answer = lambda body: "close" if time.monotonic() < until else answer(body)


SMALL_SHM = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$0" "$@"')
FAULTS = {
    "job SIGKILL": Fault(hit("job", signal.SIGKILL)),
    "command SIGTERM": Fault(hit("", signal.SIGTERM)),
    "command SIGHUP": Fault(hit("", signal.SIGHUP)),
    "raylet SIGKILL": Fault(hit("raylet/raylet", signal.SIGKILL)),
    "GCS SIGKILL": Fault(hit("gcs_server", signal.SIGKILL)),
    "GCS SIGSTOP": Fault(hit("gcs_server", signal.SIGSTOP)),
    "controller SIGKILL": Fault(hit("TrainController", signal.SIGKILL), TRAINING),
    "sampler SIGKILL": Fault(hit("MapWorker", signal.SIGKILL), SAMPLING),
    "sampler SIGSTOP": Fault(hit("MapWorker", signal.SIGSTOP), SAMPLING),
    "vLLM engine SIGKILL": Fault(hit("MapWorker", signal.SIGKILL), SAMPLING, engine="vllm"),
    "training worker SIGKILL": Fault(hit("RayTrainWorker", signal.SIGKILL), TRAINING),
    "training worker SIGSTOP": Fault(hit("RayTrainWorker", signal.SIGSTOP), TRAINING),
    "evaluator SIGKILL": Fault(hit("Evaluator", signal.SIGKILL), EVALUATING),
    "evaluator SIGSTOP": Fault(hit("Evaluator", signal.SIGSTOP), EVALUATING),
    "judge server gone": Fault(silence, JUDGING),
    "disk full": Fault(fill, around=partial(mounted, "rw"), end=writable),
    "folder read-only": Fault(moments=BEFORE, around=partial(mounted, "ro"), end=writable),
    "checkpoint cut": Fault(cut_checkpoint, CHECKPOINTS),
    "file cut": Fault(lambda cell: cut(cell.run / DATA[cell.part]), BEFORE, damages=True),
    "file deleted": Fault(lambda cell: (cell.run / DATA[cell.part]).unlink(), BEFORE, damages=True),
    "file emptied": Fault(lambda cell: os.truncate(cell.run / NOTES[cell.part], 0), BEFORE, damages=True),
    "file of 1980": Fault(lambda cell: os.utime(cell.run / DATA[cell.part], (3e8, 3e8)), BEFORE, damages=True),
    "second process": Fault(second),
    "folder moved": Fault(move),
    "/dev/shm of 16 MiB": Fault(moments=BEFORE, around=lambda cell: nullcontext(SMALL_SHM)),
    "no more memory": Fault(no_memory),
    "256 descriptors": Fault(moments=BEFORE, around=lambda cell: nullcontext(("prlimit", "--nofile=256"))),
    "ports taken, stale session": Fault(moments=BEFORE, around=occupied),
}
