"""Raw rows from JSONL and Parquet files, or from the hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from spo_ray.config.data import FileData
from spo_ray.errors import UserError
from spo_ray.runtime.artifact import DATA_FILES, Artifact, external, on_hub

ROWS_PER_BATCH = 1000
NOT_UTF8 = "not UTF-8, which JSON is written in"


class Raw(NamedTuple):
    """One row as it was read."""

    number: int
    """Its line, from 0."""
    row: dict[str, Any]
    defect: str | None
    """Why there is no row."""
    excerpt: str
    """What it begins with, after the file's name and the line (of Parquet: the row), from 1."""

    def name(self, prefix: str) -> str:
        """What it is called in a run."""
        return f"{prefix}-{self.number:06d}"


def inputs(data: FileData, split: str) -> dict[str, Artifact]:
    """What a split's rows come from, for a stage's identity."""
    if on_hub(data.path):
        return {"file": external(f"{data.path}@{data.revision}/{data.subset or ''}")}
    files = _files(data.path, split)
    return {f"file{i or ''}": external(file) for i, file in enumerate(files)}


def raw_rows(data: FileData, split: str) -> Iterator[Raw]:
    """Every row of a split, in order; blank lines are none.

    Raises:
        UserError: there is no such file or dataset, or it can't be read at all.
    """
    if on_hub(data.path):
        for number, row in enumerate(_hub(data, split)):
            yield Raw(number, row, None, str(row)[:200])
        return
    after = 0
    for file in _files(data.path, split):
        start = after
        for raw in read_jsonl(file) if file.suffix == ".jsonl" else _parquet(file):
            after = start + raw.number + 1
            yield raw._replace(number=start + raw.number, excerpt=f"{file.name}:{raw.number + 1}: {raw.excerpt}")


def _files(path: Path, split: str) -> list[Path]:
    """The file itself, or those of a split in a folder, also in the way datasets lay them out."""
    if path.is_file():
        if path.suffix not in DATA_FILES:
            raise UserError(f"{path} is no data file: data.path takes {' or '.join(DATA_FILES)}")
        return [path]
    for pattern in (f"{split}.jsonl", f"{split}.parquet", f"{split}-*.parquet", f"data/{split}-*.parquet"):
        files = sorted(path.glob(pattern)) if path.is_dir() else []
        if files:
            return files
    raise UserError(
        f"no data file {path}/{split}.jsonl (or .parquet): set data.path to a folder with {split}.jsonl, to a file, or "
        "to a dataset's name on the hub"
    )


def open_lines(file: Path) -> TextIO:
    """A text file, without its byte order mark; lines that are no UTF-8 are :func:`misread`."""
    return file.open(encoding="utf-8-sig", errors="surrogateescape")


def misread(line: str) -> bool:
    """Whether a line is in another encoding, so that its letters are unknown."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return True
    return False


def read_jsonl(file: Path) -> Iterator[Raw]:
    """Yield the rows of a JSON Lines file; blank lines are left out."""
    with open_lines(file) as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            if misread(line):
                shown = line.encode(errors="surrogateescape").decode(errors="replace")
                yield Raw(number, {}, NOT_UTF8, shown[:200].strip())
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield Raw(number, {}, "not JSON", line[:200].strip())
                continue
            if isinstance(row, dict):
                yield Raw(number, row, None, line[:200].strip())
            else:
                yield Raw(number, {}, "not a JSON object", line[:200].strip())


def _parquet(file: Path) -> Iterator[Raw]:
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(ROWS_PER_BATCH):
            for row in batch.to_pylist():
                yield Raw(number, row, None, str(row)[:200])
                number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} can't be read as Parquet: {error}") from error


def _hub(data: FileData, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # takes seconds to import

    try:
        yield from load_dataset(str(data.path), data.subset, split=split, revision=data.revision)
    except Exception as error:  # its many causes have no common class
        raise UserError(
            f"there is no file or folder {data.path} here, and the dataset of that name on the hub "
            f"(data.subset={data.subset}, split {split}) can't be loaded: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; without a network download it "
            "before (HF_HOME), or set data.path to a local file"
        ) from error
