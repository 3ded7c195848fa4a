"""Runs and their stages.

A stage writes one folder under ``runs/NAME`` and closes it with ``manifest.json``. Its identity is its name,
the version of spo_ray, the seed, its settings and the digests of its inputs; its digest is the SHA-256 of that. A
finished stage with the same digest is reused, any other is built again. A stage is written under a temporary name,
synced and renamed, so a folder with a manifest is complete.

The functions of a job pass their stages to a :class:`Run`, which builds them. The same functions plan the job with a
:class:`PlannedRun` and read its results with a :class:`FinishedRun`.
"""

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from spo_ray import __version__
from spo_ray.config.keys import leaves
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import (
    MANIFEST,
    REJECTED,
    REJECTED_PARTS,
    Artifact,
    MissingArtifact,
    PlannedArtifact,
    RowCounts,
    sync,
    versions,
    write_json,
    write_rows,
)
from spo_ray.runtime.console import log

STARTED = "started.json"
"""File in an unfinished stage that can be resumed, with its digest."""
State = Literal["reused", "resume", "build"]


@dataclass(frozen=True)
class Work:
    """Upper bounds of the work of a stage, for plans and resource checks; None where a bound is unknown."""

    rows: int | None = None
    """Rows that are read."""
    out: int | None = None
    """Rows that are written; None: as many as are read."""
    tokens: int | None = None
    """Tokens that a model generates or reads; None also if there is no model."""
    trains: str | None = None
    """``sft``, or the name of the method that is trained; None: the stage trains nothing."""
    actors: int = 0
    """Actors or workers that hold resources at the same time."""
    cpus: float = 0.0
    """CPUs of each actor or worker."""
    gpus: float | None = 0.0
    """GPUs of each actor or worker; None: one on a cluster that has GPUs."""
    settings: str = ""
    """Settings to lower if the cluster is too small."""
    note: str = ""
    """One line that describes the stage in the plan."""


@dataclass(frozen=True)
class Stage:
    """One step of a job, with everything that its output depends on."""

    name: str
    """Name of the stage and of its folder."""
    build: Callable[[Path, RowCounts], None]
    """Writes the output into the given folder, and counts rows."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the output depends on."""
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    """Stages and files that the output depends on, by name."""
    work: Work = Work()
    """Upper bounds for the plan; not a part of the identity."""
    resumable: bool = False
    """True if ``build`` continues from the files that it wrote before it was interrupted."""


def times(bound: int | None, factor: int) -> int | None:
    """Multiply an upper bound; None stays None."""
    return None if bound is None else bound * factor


def never_built(out: Path, counts: RowCounts) -> None:
    """Raise an error; the ``build`` of stages that are opened and closed by their own function."""
    raise AssertionError("this stage is not built by Run.execute")


class PlannedStage(NamedTuple):
    """One stage of a plan."""

    name: str
    """Folder of the stage, relative to that of the run."""
    state: State
    why: str
    """Why a finished stage is built again; empty otherwise."""
    work: Work


@dataclass
class OpenStage:
    """A stage that is being built."""

    name: str
    digest: str
    identity: dict[str, Any]
    scratch: Path
    """Folder of the stage while it is built."""
    counts: RowCounts = field(default_factory=RowCounts)
    started: float = field(default_factory=time.time)
    """Unix time in seconds."""


class Run:
    """The folder of one run, and the stages in it; builds stages that are not finished."""

    mode: Literal["execute", "plan", "read"] = "execute"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = (config.output / config.name).absolute()
        self.names: dict[str, str] = {}
        """Names of the opened stages by digest."""
        self.planned: list[PlannedStage] = []
        """Plan of the whole job; empty before it is planned."""
        self.under_way: list[str] = []
        """Names of the stages that are being built."""
        self.changed: Callable[[], None] = _nothing
        """Listener that is called when a stage begins or ends."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for other processes, without the listener and the stages that are being built."""
        return self.__dict__ | {"under_way": [], "changed": _nothing}

    def at(self, root: Path, config: Config | None = None) -> "Run":
        """Return this run in another folder, with another configuration if one is given.

        Both share the plan, the names of stages, the stages that are being built and the listener.
        """
        other = copy.copy(self)  # by __getstate__, so without the listener and the stages that are being built
        vars(other).update(vars(self), root=root, config=config or self.config)
        return other

    @contextmanager
    def locked(self, wait: bool = False) -> Generator[None]:
        """Keep other processes out of the run's folder; the lock is released when the process ends, however it ends.

        Raises:
            UserError: another process works there, and ``wait`` is False.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".lock", fallback_to_soft=False)  # a soft lock would outlive a killed process
        try:
            held = lock.acquire(blocking=wait)
        except Timeout as error:
            text = f"another process is working in {self.root}: wait for it, or set another name="
            raise UserError(text) from error
        with held:
            yield

    def execute(self, stage: Stage) -> Artifact:
        """Return the finished stage; build it first if it can't be reused.

        If ``build`` raises an error, earlier stages and an earlier version of this stage stay as they were.
        """
        opened = self.open(stage)
        if isinstance(opened, Artifact):
            return opened
        stage.build(opened.scratch, opened.counts)
        return self.close(opened)

    def open(self, stage: Stage, *, queued: bool = False) -> "Artifact | OpenStage":
        """Return the finished stage if it can be reused, else a folder to build it in.

        The folder is empty, unless the same stage was interrupted there and is resumable. A ``queued`` stage starts
        later, and whoever starts it logs this and its end.
        """
        name = stage.name
        identity, digest = self.identify(stage)
        state, why = self.state(name, identity, digest)
        scratch = self.root / ".unfinished" / name
        if state == "reused":
            if _digest_in(scratch) == digest:  # the process ended before it was renamed
                self._put(name)
            log(name, state)
            return Artifact(self.root / name, digest)
        if state == "build":
            if why:
                log(name, f"built again: {why}")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        if not queued:
            log(name, state)
        if stage.resumable:
            write_json(scratch / STARTED, {"digest": digest})
        if name not in self.under_way:  # it is there if an earlier attempt failed
            self.under_way.append(name)
        self.changed()
        return OpenStage(name, digest, identity, scratch)

    def identify(self, stage: Stage) -> tuple[dict[str, Any], str]:
        """Return the identity of a stage (everything that it depends on) and its digest."""
        identity = {
            "stage": stage.name,
            "version": __version__,
            "seed": self.config.seed,
            "config": dict(stage.config),
            "inputs": {key: artifact.digest for key, artifact in stage.inputs.items()},
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self.names[digest] = stage.name
        return identity, digest

    def state(self, name: str, identity: Mapping[str, Any], digest: str) -> tuple[State, str]:
        """Return the state of a stage, and the reason if a finished stage is built again, else an empty text."""
        scratch = self.root / ".unfinished" / name
        if self.finished_folder(name, digest):
            return "reused", ""
        if _digest_in(scratch, STARTED) == digest:
            return "resume", ""
        finished = self.root / name / MANIFEST
        return "build", why_again(json.loads(finished.read_text()), identity, self.names) if finished.exists() else ""

    def finished_folder(self, name: str, digest: str) -> Path | None:
        """Return the folder of the stage that has this digest and is finished, perhaps not renamed yet, or None."""
        folders = (self.root / name, self.root / ".unfinished" / name)
        return next((folder for folder in folders if _digest_in(folder) == digest), None)

    def close(self, stage: "OpenStage", wall_s: float | None = None) -> Artifact:
        """Write the manifest, move the stage to its place and return it.

        ``wall_s`` is the time in seconds of a stage that was queued; None: the time since the stage was opened.
        """
        counts = stage.counts
        if counts.rejected:
            dropped = [{**row, "stage": stage.name} for row in counts.rejected]
            write_rows(stage.scratch / REJECTED, dropped, schema.Dropped)
        manifest = stage.identity | {
            "digest": stage.digest,
            "rows": {"read": counts.read, "kept": counts.kept, "dropped": counts.dropped()},
            "facts": counts.facts,
            "versions": versions(),
            "wall_s": round(time.time() - stage.started if wall_s is None else wall_s, 2),
        }
        write_json(stage.scratch / MANIFEST, manifest)
        self._put(stage.name)
        self.under_way.remove(stage.name)
        self.changed()
        if wall_s is None:
            log(stage.name, f"done in {manifest['wall_s']:.1f} s{_summary(counts)}")
        return Artifact(self.root / stage.name, stage.digest)

    def _put(self, name: str) -> None:
        """Move a stage that has its manifest to its place, without the files that only ``build`` needed."""
        scratch = self.root / ".unfinished" / name
        (scratch / STARTED).unlink(missing_ok=True)
        for file in scratch.glob(REJECTED_PARTS):  # these rows are in rejected.parquet
            file.unlink()
        _replace(scratch, self.root / name)


class PlannedRun(Run):
    """A dry run: builds nothing and records the state of every stage in ``planned``."""

    mode = "plan"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.top = self.root
        """Folder that the recorded names are relative to, also for copies made by :meth:`at`."""
        self.problem: str | None = None
        """Error with which the job would be refused, or None."""

    @contextmanager
    def noting_problems(self) -> Generator[None]:
        """Record the first UserError as the plan's problem instead of raising it."""
        try:
            yield
        except UserError as error:
            self.problem = self.problem or str(error)

    def open(self, stage: Stage, *, queued: bool = False) -> Artifact:
        """Record a stage; return it if it is finished, else a planned artifact."""
        identity, digest = self.identify(stage)
        state, why = self.state(stage.name, identity, digest)
        name = (self.root / stage.name).relative_to(self.top).as_posix()
        self.planned.append(PlannedStage(name, state, why, stage.work))
        if found := self.finished_folder(stage.name, digest):
            return Artifact(found, digest)
        work = stage.work
        return PlannedArtifact(self.root / stage.name, digest, work.rows if work.out is None else work.out)


class FinishedRun(Run):
    """A finished run that is read from its folder, which may have been moved; builds nothing."""

    mode = "read"

    def __init__(self, config: Config, root: Path) -> None:
        super().__init__(config)
        self.root = root.resolve()

    def open(self, stage: Stage, *, queued: bool = False) -> Artifact:
        """Return a stage as it is on disk; if it is missing, an artifact that raises an error when it is read.

        Raises:
            UserError: the stage is unreadable, leads out of the run's folder, or is older than one of its inputs.
        """
        folder = self.root / stage.name
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            name, digest, inputs = manifest["stage"], str(manifest["digest"]), manifest["inputs"]
        except FileNotFoundError:
            return MissingArtifact(folder, "", self._unfinished(f"it has no stage {stage.name}"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST} can't be read: {type(error).__name__}: {error}") from error
        if name != stage.name:
            raise UserError(f"{folder / MANIFEST} is the manifest of {name!r}: nothing that it names is followed")
        for path in (folder, *folder.iterdir()):
            if not path.resolve().is_relative_to(self.root):
                raise UserError(f"{path} leads out of the run's folder, to {path.resolve()}: it is not followed")
        own = {k: a for k, a in stage.inputs.items() if a.path.is_relative_to(self.root)}
        if any(inputs.get(k) != a.digest for k, a in own.items() if not isinstance(a, MissingArtifact)):
            raise UserError(self._unfinished(f"{stage.name} is older than what it was made from"))
        return Artifact(folder, digest)

    def _unfinished(self, why: str) -> str:
        return f"{self.root} is not finished, {why}: run it again, finished stages are reused"


def _nothing() -> None:
    """Default listener: does nothing."""


def _digest_in(directory: Path, file: str = MANIFEST) -> str | None:
    try:
        return json.loads((directory / file).read_text())["digest"]
    except FileNotFoundError:
        return None


def _summary(counts: RowCounts) -> str:
    if not counts.read:
        return ""
    dropped = "".join(f", {n} dropped ({reason})" for reason, n in counts.dropped().items())
    return f": {counts.read} rows read, {counts.kept} kept{dropped}"


def _replace(scratch: Path, final: Path) -> None:
    old = scratch.with_name(f"{scratch.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    scratch.replace(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


SHOWN = 4
"""Number of differences that are listed."""
NOTHING = "not there"


def why_again(manifest: Mapping[str, Any], identity: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the differences between a stage's manifest and its present identity as one line.

    ``names`` are the names of this run's stages by digest.
    """
    now, heads = json.loads(json.dumps(identity, default=str)), {"version": "spo_ray", "seed": "seed"}
    found = [f"{head} {manifest.get(k)} -> {now[k]}" for k, head in heads.items() if manifest.get(k) != now[k]]
    before, after = (dict(leaves(side.get("config", {}))) for side in (manifest, now))
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, NOTHING), after.get(key, NOTHING)
        found += [f"{key} {shown(old)} -> {shown(new)}"] if old != new else []
    inputs = manifest.get("inputs", {})
    found += [f"input changed: {names.get(d, key)}" for key, d in now["inputs"].items() if inputs.get(key) != d]
    found += [f"input removed: {key}" for key in inputs if key not in now["inputs"]]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def shown(value: Any) -> str:
    """Return a value as text of at most 40 characters."""
    text = value if value is NOTHING else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
