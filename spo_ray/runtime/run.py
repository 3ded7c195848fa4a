"""Runs and their stages.

A stage writes one folder under ``runs/NAME`` and closes it with ``manifest.json``. Its identity is its name,
the version of spo_ray, the seed, its settings and the digests of its inputs; its digest is the SHA-256 of that. A
finished stage with the same digest is reused if its files are those that the manifest records, any other is built
again. A stage is written under a temporary name, synced and renamed, so a folder with a manifest was complete.

The functions of a job pass their stages to a :class:`Run`, which builds them. The same functions plan the job with a
:class:`PlannedRun` and read its results with a :class:`spo_ray.runtime.finished_run.FinishedRun`.
"""

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from spo_ray import __version__
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import (
    REJECTED,
    REJECTED_PARTS,
    STARTED,
    Artifact,
    Lengths,
    PlannedArtifact,
    RowCounts,
    changed_files,
    make_way,
    recorded_files,
    set_aside,
    sync,
    versions,
    write_json,
    write_rows,
)
from spo_ray.runtime.conditions import conditions
from spo_ray.runtime.console import log
from spo_ray.runtime.first_start import dated, keep_date
from spo_ray.runtime.manifest import (
    MANIFEST,
    Identified,
    UnreadableError,
    read_manifest,
    read_model,
    some_of,
    why_again,
)

LOCK = ".lock"
State = Literal["reused", "resume", "build"]
TOLD: dict[State, str] = {"reused": "reused", "resume": "resumed", "build": "started"}
"""Words of the log for what becomes of a stage."""


@dataclass(frozen=True)
class Work:
    """Upper bounds of the work of a stage, for plans and resource checks; None where a bound is unknown."""

    rows: int | None = None
    """Rows that are read."""
    out: int | None = None
    """Rows that are written; None: as many as are read."""
    tokens: int | None = None
    """Tokens that a model generates or reads; None also if there is no model."""
    lengths: Lengths | None = None
    """Tokens of a row that is written; None: unknown, so that ``tokens`` counts every row with the largest length."""
    generates: bool = False
    """True if the tokens are generated one after another, which is slower than reading them."""
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


def reading(rows: Artifact, longest: int, passes: int = 1) -> dict[str, Any]:
    """Return ``rows``, ``tokens`` and ``lengths`` of the work of a stage that reads token ids ``passes`` times.

    Without the rows' lengths each has ``longest`` tokens.
    """
    bound, lengths = rows.max_rows, rows.lengths
    each = lengths.mean if lengths else longest
    return {"rows": bound, "tokens": None if bound is None else ceil(bound * passes * each), "lengths": lengths}


def never_built(out: Path, counts: RowCounts) -> None:
    """Raise an error; the ``build`` of stages that are opened and closed by their own function."""
    raise AssertionError("this stage is not built by Run.execute")


class Found(NamedTuple):
    """What there is of a stage."""

    state: State
    why: str = ""
    """Why a finished stage is built again; empty otherwise."""
    folder: Path | None = None
    """Folder of the stage if it is reused, perhaps not renamed yet."""


class PlannedStage(NamedTuple):
    """One stage of a plan."""

    name: str
    """Folder of the stage, relative to that of the run."""
    state: State
    why: str
    """Why a finished stage is built again; empty otherwise."""
    work: Work
    conditions: dict[str, Any] = {}
    """What its time depends on, see :func:`spo_ray.runtime.conditions.conditions`."""


@dataclass
class OpenStage:
    """A stage that is being built."""

    name: str
    digest: str
    identity: dict[str, Any]
    scratch: Path
    """Folder of the stage while it is built."""
    conditions: dict[str, Any] = field(default_factory=dict)
    counts: RowCounts = field(default_factory=RowCounts)
    started: float = field(default_factory=time.time)
    """Unix time in seconds."""


class Run:
    """The folder of one run, and the stages in it; builds stages that are not finished."""

    mode: Literal["execute", "plan", "read"] = "execute"

    def __init__(self, config: Config, *, verify: bool = False) -> None:
        self.verify = verify
        """Compare the contents of finished stages' files too, not only names, sizes and numbers of rows."""
        self.root = (config.output / config.name).absolute()
        self.config = dated(config, self.root)
        self.names: dict[str, str] = {}
        """Names of the opened stages by digest."""
        self.planned: list[PlannedStage] = []
        """Plan of the whole job; empty before it is planned."""
        self.expected: tuple[float, float] | None = None
        """Seconds that the job is expected to take, from and to; None before it is planned."""
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
            UserError: another process works there, and ``wait`` is False; or the folder can't be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if (self.root / LOCK).is_dir():
                set_aside(self.root / LOCK, "is a folder, not the lock of a run")
            lock = FileLock(self.root / LOCK, fallback_to_soft=False)  # a soft lock would outlive a killed process
            held = lock.acquire(blocking=wait)
        except Timeout as error:
            text = f"another process is working in {self.root}: wait for it, or set another name="
            raise UserError(text) from error
        except OSError as error:
            needs = "a run needs a folder that it can write in: set another name= or output="
            raise UserError(f"{error.filename}: {error.strerror}; {needs}") from error
        with held:
            keep_date(self.config, self.root)
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
        found = self.find(name, identity, digest)
        scratch = self.root / ".unfinished" / name
        if found.state == "reused":
            if found.folder == scratch:  # the process ended before it was renamed
                self._put(name)
            log(name, TOLD[found.state])
            return Artifact(self.root / name, digest)
        if found.state == "build":
            if found.why:
                log(name, f"built again: {found.why}")
            for path in (scratch.parent, self.root / name):
                if not path.is_dir():  # a link to a folder may be there on purpose
                    make_way(path)
            make_way(scratch)
            scratch.mkdir(parents=True)
        if not queued:
            log(name, TOLD[found.state])
        if stage.resumable:
            write_json(scratch / STARTED, {"digest": digest})
        if name not in self.under_way:  # it is there if an earlier attempt failed
            self.under_way.append(name)
        self.changed()
        return OpenStage(name, digest, identity, scratch, self.conditions(stage.work))

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

    def conditions(self, work: Work) -> dict[str, Any]:
        """Return what the time of a stage depends on, beside its rows."""
        return conditions(self.config, work.trains, work.actors, work.cpus)

    def find(self, name: str, identity: Mapping[str, Any], digest: str) -> Found:
        """Return whether a stage is there, can be resumed or is built, and the reason if it was finished before."""
        scratch = self.root / ".unfinished" / name
        reasons: list[str] = []
        for folder in (self.root / name, scratch):
            try:
                manifest = read_manifest(folder)
            except UnreadableError as error:
                reasons.append(str(error))
                continue
            if manifest is None:
                reasons += [f"{name}/{MANIFEST} is missing"] if folder != scratch and folder.exists() else []
            elif manifest["digest"] != digest:
                reasons.append(why_again(manifest, identity, self.names))
            elif changed := changed_files(folder, manifest["files"], self.verify):
                reasons.append(some_of(changed))
            else:
                return Found("reused", folder=folder)
        try:
            started = read_model(scratch / STARTED, Identified)
        except UnreadableError as error:
            return Found("build", "; ".join([*reasons, str(error)]))
        if started and started.digest == digest:
            return Found("resume")
        return Found("build", reasons[0] if reasons else "")

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
            "files": recorded_files(stage.scratch),
            "facts": counts.facts,
            "conditions": stage.conditions,
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

    def __init__(self, config: Config, *, verify: bool = False) -> None:
        super().__init__(config, verify=verify)
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
        found = self.find(stage.name, identity, digest)
        name = (self.root / stage.name).relative_to(self.top).as_posix()
        self.planned.append(PlannedStage(name, found.state, found.why, stage.work, self.conditions(stage.work)))
        if found.folder:
            return Artifact(found.folder, digest)
        work = stage.work
        bound = work.rows if work.out is None else work.out
        return PlannedArtifact(self.root / stage.name, digest, bound, work.lengths)


def _nothing() -> None:
    """Default listener: does nothing."""


def _summary(counts: RowCounts) -> str:
    if not counts.read:
        return ""
    dropped = "".join(f", {n} dropped ({reason})" for reason, n in counts.dropped().items())
    return f": {counts.read} rows read, {counts.kept} kept{dropped}"


def _replace(scratch: Path, final: Path) -> None:
    old = scratch.with_name(f"{scratch.name}.old")
    make_way(old)
    if final.exists():
        final.replace(old)
    scratch.replace(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
