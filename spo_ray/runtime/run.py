"""Runs and their stages.

A stage writes one folder under ``runs/NAME`` and closes it with ``manifest.json``. Its identity is the digest of its
settings and of its inputs' identities: a finished stage with the same identity is reused, any other is built again.
A stage is written under a temporary name, synced and renamed, so a folder with a manifest is complete.

The functions of a job hand their stages to a :class:`Run`. The same functions describe the job to a
:class:`PlannedRun`, which builds nothing and records what would happen, and to a :class:`FinishedRun`, which gives what
is on disk.
"""

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
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
    _count,
    _sync,
    versions,
    write_json,
    write_rows,
)
from spo_ray.runtime.console import log

STARTED = "started.json"
"""File in an unfinished stage that can be resumed."""
State = Literal["reused", "resume", "build"]


@dataclass(frozen=True)
class Work:
    """Upper bounds of the work of a stage, for plans and resource checks; None where a bound is unknown."""

    rows: int | None = None
    """Rows read."""
    out: int | None = None
    """Rows written; None: as many as are read."""
    tokens: int | None = None
    """Tokens that a model generates or reads; None also where there is no model."""
    trains: str | None = None
    """``sft``, or the name of the method that is trained."""
    actors: int = 0
    """Actors or workers that hold resources at the same time."""
    cpus: float = 0.0
    """CPUs of each."""
    gpus: float | None = 0.0
    """GPUs of each; None: one each on a cluster that has GPUs."""
    settings: str = ""
    """Settings to lower where the cluster is too small."""
    note: str = ""
    """One line for people."""


@dataclass(frozen=True)
class Stage:
    """One step of a job, with everything that its output depends on."""

    name: str
    """Name of its folder."""
    build: Callable[[Path, RowCounts], None]
    """Writes the output into the folder it is given, and counts rows."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the output depends on."""
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    work: Work = Work()
    resumable: bool = False
    """``build`` finds what it wrote before it was interrupted."""


def times(bound: int | None, factor: int) -> int | None:
    """Multiply an upper bound; None stays None."""
    return None if bound is None else bound * factor


def never_built(out: Path, counts: RowCounts) -> None:
    """Stand in for ``build`` in stages that are opened and closed by their own function."""
    raise AssertionError("this stage is not built by Run.execute")


class PlannedStage(NamedTuple):
    """What would happen to a stage."""

    name: str
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
    """Its folder while it is built."""
    counts: RowCounts = field(default_factory=RowCounts)
    started: float = field(default_factory=time.time)


class Run:
    """One run's folder, and the stages in it."""

    mode: Literal["execute", "plan", "read"] = "execute"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = (config.output / config.name).absolute()
        self.names: dict[str, str] = {}
        """Names of the stages that were opened, by digest."""
        self.planned: list[PlannedStage] = []
        """The plan of the whole job, once it is made."""
        self.under_way: list[str] = []
        self.changed: Callable[[], None] = _nothing
        """Called when a stage begins or ends."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the listener, which stays in this process."""
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
        """Return the finished stage: reuse it, or build it and close it.

        Whatever ``build`` raises leaves earlier stages, and an earlier version of this one, as they were.
        """
        opened = self.open(stage)
        if isinstance(opened, Artifact):
            return opened
        stage.build(opened.scratch, opened.counts)
        return self.close(opened)

    def open(self, stage: Stage) -> "Artifact | OpenStage":
        """Return the finished stage if it can be reused, else a folder to build it in.

        The folder is empty, unless the same stage was interrupted there and is resumable.
        """
        name = stage.name
        identity, digest = self.identify(stage)
        state, why = self.state(name, identity, digest)
        scratch = self.root / ".unfinished" / name
        if state == "reused":
            if _identity(scratch) == digest:  # interrupted on the way to its place
                self._put(name)
            log(name, state)
            return Artifact(self.root / name, digest)
        if state == "build":
            if why:
                log(name, f"built again: {why}")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        log(name, state)
        if stage.resumable:
            write_json(scratch / STARTED, {"digest": digest})
        if name not in self.under_way:  # it is there if an earlier attempt failed
            self.under_way.append(name)
        self.changed()
        return OpenStage(name, digest, identity, scratch)

    def identify(self, stage: Stage) -> tuple[dict[str, Any], str]:
        """Return what a stage depends on, and the digest of that."""
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
        """Return what would happen to a stage, and why if a finished one is built again."""
        scratch = self.root / ".unfinished" / name
        if digest in (_identity(self.root / name), _identity(scratch)):
            return "reused", ""
        if _identity(scratch, STARTED) == digest:
            return "resume", ""
        finished = self.root / name / MANIFEST
        return "build", why_again(json.loads(finished.read_text()), identity, self.names) if finished.exists() else ""

    def close(self, stage: "OpenStage", wall_s: float | None = None) -> Artifact:
        """Write the manifest and move the stage to its place.

        ``wall_s`` is the time to record if it is not the time since the stage was opened.
        """
        counts = stage.counts
        if counts.rejected:
            dropped = [{**row, "stage": stage.name} for row in counts.rejected]
            write_rows(stage.scratch / REJECTED, dropped, schema.Dropped)
        manifest = stage.identity | {
            "digest": stage.digest,
            "rows": {"read": counts.read, "kept": counts.kept, "dropped": _count(counts.rejected)},
            "facts": counts.facts,
            "versions": versions(),
            "wall_s": round(time.time() - stage.started if wall_s is None else wall_s, 2),
        }
        write_json(stage.scratch / MANIFEST, manifest)
        self._put(stage.name)
        self.under_way.remove(stage.name)
        self.changed()
        log(stage.name, f"done in {manifest['wall_s']:.1f} s{_summary(counts)}")
        return Artifact(self.root / stage.name, stage.digest)

    def _put(self, name: str) -> None:
        """Move a stage that has its manifest to its place, without files that only building it needed."""
        scratch = self.root / ".unfinished" / name
        (scratch / STARTED).unlink(missing_ok=True)
        for file in scratch.glob(REJECTED_PARTS):  # these rows are in rejected.parquet
            file.unlink()
        _replace(scratch, self.root / name)


class PlannedRun(Run):
    """A dry run: it builds nothing and records in ``planned`` what would happen to every stage."""

    mode = "plan"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.top = self.root
        """Folder that the recorded names are relative to; copies at other places keep it."""
        self.problem: str | None = None
        """Why the job would be refused, or None."""

    @contextmanager
    def noting_problems(self) -> Generator[None]:
        """Record the first UserError as the plan's problem instead of raising it."""
        try:
            yield
        except UserError as error:
            self.problem = self.problem or str(error)

    def open(self, stage: Stage) -> Artifact:
        """Record a stage; return it if it can be reused, else a planned artifact."""
        identity, digest = self.identify(stage)
        state, why = self.state(stage.name, identity, digest)
        name = (self.root / stage.name).relative_to(self.top).as_posix()
        self.planned.append(PlannedStage(name, state, why, stage.work))
        for folder in (self.root / stage.name, self.root / ".unfinished" / stage.name):
            if _identity(folder) == digest:
                return Artifact(folder, digest)
        work = stage.work
        return PlannedArtifact(self.root / stage.name, digest, work.rows if work.out is None else work.out)


class FinishedRun(Run):
    """A finished run that is read back from its folder, wherever that was moved to; nothing is computed."""

    mode = "read"

    def __init__(self, config: Config, root: Path) -> None:
        super().__init__(config)
        self.root = root.resolve()

    def open(self, stage: Stage) -> Artifact:
        """Return a stage as it is on disk; a missing one can't be read, but does no harm where nobody needs it.

        Raises:
            UserError: it is unreadable, leads out of the run's folder, or is older than one of its inputs.
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


def _identity(directory: Path, file: str = MANIFEST) -> str | None:
    try:
        return json.loads((directory / file).read_text())["digest"]
    except FileNotFoundError:
        return None


def _summary(counts: RowCounts) -> str:
    if not counts.read:
        return ""
    dropped = "".join(f", {n} dropped ({reason})" for reason, n in _count(counts.rejected).items())
    return f": {counts.read} rows read, {counts.kept} kept{dropped}"


def _replace(scratch: Path, final: Path) -> None:
    old = scratch.with_name(f"{scratch.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    scratch.replace(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


SHOWN = 4
"""Differences that are named; of more only the number."""
NOTHING = "not there"


def why_again(manifest: Mapping[str, Any], identity: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """One line for people: the differences between a stage's manifest and its identity now.

    ``names`` has the stages of this run by their digests.
    """
    found = list(_differences(manifest, json.loads(json.dumps(identity, default=str)), names))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    for key, what in (("version", "spo_ray"), ("seed", "seed")):
        if old.get(key) != new[key]:
            yield f"{what} {old.get(key)} -> {new[key]}"
    before, now = (dict(leaves(side.get("config", {}))) for side in (old, new))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key, NOTHING) != now.get(key, NOTHING):
            yield f"{key} {shown(before.get(key, NOTHING))} -> {shown(now.get(key, NOTHING))}"
    inputs = old.get("inputs", {})
    for key, digest in new["inputs"].items():
        if inputs.get(key) != digest:
            yield f"input changed: {names.get(digest, key)}"
    yield from (f"input removed: {key}" for key in inputs if key not in new["inputs"])


def shown(value: Any) -> str:
    """A value for people."""
    text = value if value is NOTHING else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
