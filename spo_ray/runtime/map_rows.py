"""Stages that map rows with Ray Data; each task writes the rows it made as one Parquet shard.

The items in Ray Data are shards: which rows to read, and how many were written. Rows never pass through the driver, and
a single operator reads, maps and writes, so that no further worker processes start. A retried task replaces its own
file, so no row is written twice; an interrupted stage resumes with the shards whose files are missing.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from spo_ray.errors import RowRejectedError, UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import REJECTED_PARTS, Artifact, RowCounts, write_rows
from spo_ray.runtime.cluster import REPEATED
from spo_ray.runtime.console import log, progress
from spo_ray.runtime.heartbeat import beating, watched

warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # restarts have no parameter with a name

Row = dict[str, Any]
Mapped = tuple[list[Row], list[schema.Rejected]]
Mapper = Callable[[list[Row]], Mapped]
"""Function from rows to (mapped rows, quarantined rows)."""


@dataclass(frozen=True)
class Pool:
    """Resources of actors that keep state, such as a model, between batches."""

    actors: int
    cpus: float
    gpus: float = 0.0
    most: int | None = None
    """Upper bound of actors that Ray Data may scale to; None: ``actors``."""
    timeout_s: float | None = None
    """Seconds after which an actor that works on one shard is ended and started again; None: no limit."""


def each_row(function: Callable[[Row], list[Row]]) -> Mapper:
    """Return a mapper that applies a function from one row to a list of rows."""

    def mapper(batch: list[Row]) -> Mapped:
        kept: list[Row] = []
        rejected: list[schema.Rejected] = []
        for row in batch:
            try:
                kept += function(row)
            except RowRejectedError as error:
                rejected.append({"id": row["id"], "reason": str(error), "excerpt": str(row)[:200]})
            except Exception as error:
                error.add_note(f"row {row['id']}")
                raise
        return kept, rejected

    return mapper


def map_shards(
    name: str,
    source: Artifact,
    out: Path,
    row_counts: RowCounts,
    *,
    mapper: Callable[..., Mapper],
    kind: Any,
    batch_size: int,
    pool: Pool | None = None,
    **arguments: Any,
) -> None:
    """Map a stage's rows with ``mapper(**arguments)`` and write the results into ``out``.

    Args:
        name: name of the stage, for progress.
        source: the stage whose rows are read.
        out: directory of the shards, and of files with rejected rows.
        row_counts: the counts are added here.
        mapper: makes the row mapper, in the driver or, with ``pool``, once in each actor.
        kind: row class of the output, from :mod:`spo_ray.runtime.schema`.
        batch_size: input rows per call of the row mapper and per shard.
        pool: resources of the actors; None: stateless tasks of one CPU.
        arguments: keyword arguments of ``mapper``.

    Raises:
        UserError: ``mapper`` raised it.
    """
    every = _shards_of(source, batch_size)
    shards = []
    for shard in every:
        kept, rejected = _rows_in(_part(out, shard)), _rows_in(_rejected(out, shard))
        if kept is not None and (rejected is not None or not _rejected(out, shard).exists()):
            row_counts.read += shard["rows"]
            row_counts.kept += kept
        else:
            shards.append(shard)
    if every and len(shards) < len(every):
        log(name, f"{len(every) - len(shards)} of {len(every)} parts are there from the last attempt")
    if shards:
        task = {"name": name, "mapper": mapper, "arguments": arguments, "out": out, "kind": kind, "beats": watched()}
        task["limit"] = pool.timeout_s if pool else None
        _run(name, shards, row_counts, pool, task)
    for file in sorted(out.glob(REJECTED_PARTS)):
        row_counts.rejected += pq.read_table(file).to_pylist()


def _run(name: str, shards: list[Row], row_counts: RowCounts, pool: Pool | None, task: Row) -> None:
    dataset = ray.data.from_items(shards, override_num_blocks=len(shards))
    if pool is None:
        stats = dataset.map(_MapAndWrite(**task).__call__, num_cpus=1, max_retries=REPEATED["max_task_retries"])
    else:
        actor: Any = _MapAndWrite  # Ray's annotation allows functions only
        stats = dataset.map(
            actor,
            fn_constructor_kwargs=task,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(pool.actors, len(shards)), max_size=min(pool.most or pool.actors, len(shards))
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            **REPEATED,
        )
    total = sum(shard["rows"] for shard in shards)
    done, kept = 0, 0
    with progress(name) as update:
        for shard in stats.iter_rows():
            if shard["refused"] is not None:
                raise UserError(shard["refused"])
            row_counts.read += shard["read"]
            row_counts.kept += shard["kept"]
            done, kept = done + shard["read"], kept + shard["kept"]
            update(done, total, f"{done}/{total} rows read, {kept} written")


class _MapAndWrite:
    """Reads the rows of a shard, maps them and writes the result."""

    def __init__(
        self,
        name: str,
        mapper: Callable[..., Mapper],
        arguments: Row,
        out: Path,
        kind: Any,
        beats: Path | None,
        limit: float | None,
    ) -> None:
        self.out, self.kind, self.beat = out, kind, (beats, f"a process of {name}", limit)
        self.mapper, self.refused = None, None
        try:
            with beating(*self.beat):
                self.mapper = mapper(**arguments)
        except UserError as error:  # raised in the driver: Ray would print its own traces of it
            self.refused = str(error)

    def __call__(self, shard: Row) -> Row:
        if self.mapper is None:
            return {"read": 0, "kept": 0, "refused": self.refused}
        with beating(*self.beat):
            return self._map(self.mapper, shard)

    def _map(self, mapper: Mapper, shard: Row) -> Row:
        table: list[Row] = []
        for piece in shard["pieces"]:
            table += pq.read_table(piece["file"]).slice(piece["start"], piece["rows"]).to_pylist()
        try:
            kept, rejected = mapper(table)
        except Exception as error:
            error.add_note(f"shard {shard['name']}, rows {table[0]['id']} to {table[-1]['id']}")
            raise
        if rejected:  # before the kept rows, whose file marks the shard as done
            write_rows(_rejected(self.out, shard), rejected, schema.Rejected)
        write_rows(_part(self.out, shard), kept, self.kind)
        return {"read": len(table), "kept": len(kept), "refused": None}


def _shards_of(source: Artifact, batch_size: int) -> list[Row]:
    """Return shards of at most ``batch_size`` rows: each a name, a row count and pieces (file, first row, rows)."""
    shards: list[Row] = []
    room = 0
    for file in source.parts:
        start, left = 0, pq.read_metadata(file).num_rows
        while left:
            if not room:
                shards.append({"name": f"{len(shards):05d}", "rows": 0, "pieces": []})
                room = batch_size
            taken = min(room, left)
            shards[-1]["pieces"].append({"file": file, "start": start, "rows": taken})
            shards[-1]["rows"] += taken
            start, left, room = start + taken, left - taken, room - taken
    return shards


def _part(out: Path, shard: Row) -> Path:
    return out / f"part-{shard['name']}.parquet"


def _rejected(out: Path, shard: Row) -> Path:
    return out / f"rejected-{shard['name']}.parquet"


def _rows_in(file: Path) -> int | None:
    """Return the number of rows of an earlier start's file; None if it is missing or can't be read."""
    try:
        return pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException):
        return None
