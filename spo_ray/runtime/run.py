"""Runs, stages and artifacts.

A stage writes one directory under ``runs/NAME`` and closes it with ``manifest.json``. Its identity is the digest of
its configuration and its inputs' identities: a finished stage with the same identity is reused, any other is redone.
A stage is written to a temporary name, synced and renamed, so a directory with a manifest is complete.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from spo_ray import __version__
from spo_ray.config.schema import Config
from spo_ray.errors import UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import (
    MANIFEST,
    REJECTED,
    REJECTED_PARTS,
    Artifact,
    RowCounts,
    _count,
    _sync,
    versions,
    write_json,
    write_rows,
)
from spo_ray.runtime.console import log

STARTED = "started.json"
"""In an unfinished stage that can go on where it was cut off."""
State = Literal["reused", "goes on", "starts"]


@dataclass
class OpenStage:
    """A stage that is being built."""

    name: str
    digest: str
    identity: dict[str, Any]
    scratch: Path
    counts: RowCounts = field(default_factory=RowCounts)
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
        lock = FileLock(self.root / ".lock", fallback_to_soft=False)  # a soft lock would outlive a killed process
        try:
            held = lock.acquire(blocking=wait)
        except Timeout as error:
            text = f"another process is working in {self.root}: wait for it, or set another name="
            raise UserError(text) from error
        with held:
            yield

    def stage(
        self,
        name: str,
        build: Callable[[Path, RowCounts], None],
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        resumable: bool = False,
    ) -> Artifact:
        """Give the finished stage ``name``: reuse it, or call ``build(directory, counts)`` and close it.

        ``config`` is everything besides ``inputs`` that the output depends on. Whatever ``build`` raises leaves
        earlier stages, and an earlier version of this one, as they were. A ``resumable`` one finds what it has written
        when it is called again.
        """
        opened = self.open(name, config=config, inputs=inputs, resumable=resumable)
        if isinstance(opened, Artifact):
            return opened
        build(opened.scratch, opened.counts)
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
            log(name, state)
            return Artifact(self.root / name, digest)
        if state == "starts":
            if why:
                log(name, f"made again: {why}")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        log(name, state)
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
        """Move a stage that has its manifest to its place, without what it needed while it was built."""
        scratch = self.root / ".unfinished" / name
        (scratch / STARTED).unlink(missing_ok=True)
        for file in scratch.glob(REJECTED_PARTS):  # they are in the counts
            file.unlink()
        _replace(scratch, self.root / name)


def _nothing() -> None:
    """Nobody watches."""


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
            yield f"its input {names.get(digest, key)} is another"
    yield from (f"without its input {key}" for key in inputs if key not in new["inputs"])


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested mappings by their dotted keys."""
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else key)


def shown(value: Any) -> str:
    """A value for people."""
    text = value if value is NOTHING else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
