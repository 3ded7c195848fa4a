"""Reads raw rows from JSON Lines, JSON or Parquet files, or datasets on the hub."""

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from spo_ray.config.base import RowSource
from spo_ray.errors import UserError, first_line
from spo_ray.runtime.artifact import DATA_FILES, Artifact, external, nearest, on_hub

ROWS_PER_BATCH = 1000
"""Rows of a Parquet file that are in memory at the same time."""
LONGEST_LINE, LONGEST_JSON, BLOCK = 2**26, 2**32, 2**20
"""Most characters of a line and of a JSON array, which is read in blocks: a small compressed file can hold as many as
fill the memory."""


class Raw(NamedTuple):
    """One row as it was read."""

    number: int
    """Number of its line in a text file, or of its row, from 0."""
    row: dict[str, Any]
    defect: str | None
    """Reason why the row could not be read, or None."""
    excerpt: str
    """Beginning of its text; of a file's row after the file's name and the number from 1."""

    def name(self, prefix: str) -> str:
        """Return the id of the row in a run."""
        return f"{prefix}-{self.number:06d}"


def inputs(data: RowSource, split: str) -> dict[str, Artifact]:
    """Return the files or the dataset of a split, for the identity of a stage."""
    if on_hub(data.path):
        return {"file": external(f"{data.path}@{data.revision}/{data.subset or ''}")}
    return {f"file{i or ''}": external(file) for i, file in enumerate(data_files(data.path, split))}


def raw_rows(data: RowSource, split: str) -> Iterator[Raw]:
    """Yield every row of a split in order, without blank lines.

    Raises:
        UserError: there is no such file or dataset, or it can't be read at all.
    """
    if on_hub(data.path):
        yield from _numbered(_hub(data, split))
        return
    start = 0
    for file in data_files(data.path, split):
        last = -1
        for raw in READERS[_plain(file).suffix](file):
            last = raw.number
            yield raw._replace(number=start + last, excerpt=f"{file.name}:{last + 1}: {raw.excerpt}")
        start += last + 1


def read_jsonl(file: Path) -> Iterator[Raw]:
    """Yield the rows of a JSON Lines file; blank lines are left out."""
    with _opened(file) as lines:
        try:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), "")):
                too_long = len(line) == LONGEST_LINE and not line.endswith("\n")
                rest = "" if too_long else "\n"
                while rest[-1:] != "\n" and (rest := lines.readline(LONGEST_LINE)):
                    pass
                if too_long or line.strip():
                    row, defect = ({}, f"longer than {LONGEST_LINE:,} characters") if too_long else _parsed(line)
                    shown = line.encode(errors="surrogateescape").decode(errors="replace")
                    yield Raw(number, row, defect, shown[:200].strip())
        except OSError as error:
            raise UserError(f"{file} can't be read: {error}") from error


def _read_json(file: Path) -> Iterator[Raw]:
    """Yield the rows of a JSON array; a file that begins otherwise is read as JSON Lines."""
    with _opened(file) as stream:
        begins = stream.read(4096).lstrip()[:1]
    if begins != "[":
        yield from read_jsonl(file)
        return
    try:
        with _opened(file) as stream:  # in blocks, because memory for a block is taken at once
            size = min(BLOCK, LONGEST_JSON)
            blocks = islice(iter(partial(stream.read, size), ""), LONGEST_JSON // size)
            text = "".join(blocks)
        if len(text) == LONGEST_JSON:
            raise UserError(f"{file} has {LONGEST_JSON:,} characters or more: convert it to JSON Lines")
        rows = json.loads(text)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file} can't be read as JSON: {error}") from error
    for number, row in enumerate(rows):
        fine = isinstance(row, dict)
        yield Raw(number, row if fine else {}, None if fine else "not a JSON object", str(row)[:200])


def _opened(file: Path) -> io.TextIOWrapper:
    """Open a text file, which is decompressed if its name ends in ``.gz`` or ``.zst``."""
    stream: Any = pa.input_stream(str(file), compression="detect")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")


def _parsed(line: str) -> tuple[dict[str, Any], str | None]:
    """Return (row, reason why it is no row)."""
    try:
        line.encode()  # fails for bytes that are not UTF-8
    except UnicodeEncodeError:
        return {}, "not UTF-8, which JSON is written in"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}, "not JSON"
    return (row, None) if isinstance(row, dict) else ({}, "not a JSON object")


def _numbered(rows: Iterator[dict[str, Any]]) -> Iterator[Raw]:
    for number, row in enumerate(rows):
        yield Raw(number, row, None, str(row)[:200])


def data_files(path: Path, split: str) -> list[Path]:
    """Return the file itself, or the files of a split in a folder, also if it is laid out as on the hub.

    Raises:
        UserError: there is none, or several may hold the same rows.
    """
    if path.is_file():
        if not path.name.endswith(DATA_FILES):
            raise UserError(f"{path} is no data file: the path takes {', '.join(DATA_FILES)}")
        return [path]
    names = [pattern.format(split, end) for end in DATA_FILES for pattern in ("{}{}", "{}-*{}", "data/{}-*{}")]
    files = sorted(file for name in names for file in path.glob(name) if file.is_file()) if path.is_dir() else []
    for one, other in pairwise(files):
        alike = one.parent == other.parent and _plain(one).suffix == _plain(other).suffix
        if not alike or _plain(one) == _plain(other):
            raise UserError(f"{one} and {other} may hold the same rows: name one in data.path, or move the other")
    if files:
        return files
    name = path if path.name.endswith(DATA_FILES) else f"{path}/{split}.jsonl (or .parquet)"
    raise UserError(
        f"no data file {name}{nearest(path)}: set the path to a folder with {split}.jsonl, to a file, or to a "
        "dataset's name on the hub"
    )


def _plain(file: Path) -> Path:
    """Return a file's name without the ending of a compression."""
    return file.with_suffix("") if file.suffix in (".gz", ".zst") else file


def _read_parquet(file: Path) -> Iterator[Raw]:
    """Yield the rows of a Parquet file; what Python can't hold, such as a date after the year 9999, is a defect."""
    rows = count()
    try:
        for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_BATCH):
            yield from (Raw(next(rows), row, defect, str(row)[:200]) for row, defect in _converted(batch))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} can't be read as Parquet: {error}") from error


def _converted(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Yield (row, reason why it is no row); the rows one by one if one of them can't be converted."""
    try:
        yield from [(row, None) for row in batch.to_pylist()]
    except Exception as error:  # their classes depend on the type of the column
        if batch.num_rows == 1:
            yield {}, f"can't be read ({first_line(error)[:200]})"
        else:
            for number in range(batch.num_rows):
                yield from _converted(batch.slice(number, 1))


READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""Readers of files by the ending of their names."""


def _hub(data: RowSource, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # takes seconds to import

    try:
        yield from load_dataset(str(data.path), data.subset, split=split, revision=data.revision)
    except Exception as error:  # the causes have no common class
        raise UserError(
            f"there is no file or folder {data.path} here, and the dataset of that name on the hub "
            f"(subset={data.subset}, split {split}) can't be loaded: {first_line(error)}; without a network "
            "download it before (HF_HOME), or set the path to a local file"
        ) from error
