"""Row-mapping stages on Ray Data, written as Parquet shards by the tasks that made the rows.

What travels through Ray Data are shards: which rows to read, and how many came out. Rows never pass through the driver,
and one operator does all the work, which spares the start of more worker processes. A retried task replaces its own
file, so no row is written twice; a stage that was cut off goes on with the shards whose files are missing.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray.data

from spo_ray.errors import RowRejectedError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import REJECTED_PARTS, Artifact, RowCounts, write_rows
from spo_ray.runtime.console import log, progress

Row = dict[str, Any]
Mapped = tuple[list[Row], list[schema.Rejected]]
Mapper = Callable[[list[Row]], Mapped]
"""Rows in, (rows out, quarantined rows)."""


@dataclass(frozen=True)
class Pool:
    """Actors that keep state, such as a model, between batches."""

    actors: int
    cpus: float
    gpus: float = 0.0
    most: int | None = None
    """Actors may be added up to so many; None: no more."""


def each_row(function: Callable[[Row], list[Row]]) -> Mapper:
    """A mapper from a function of one row to any number of rows."""

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
    """Send a stage's rows through ``mapper(**arguments)`` and write the results into ``out``.

    Args:
        name: the stage, for progress lines.
        source: the stage to read.
        out: directory of the shards, and of ``rejected.parquet``.
        row_counts: receives the counts.
        mapper: makes the row mapper inside a task or, with ``pool``, once in each actor.
        kind: row class of the output, from :mod:`spo_ray.runtime.schema`.
        batch_size: rows per call, and input rows per shard.
        pool: actors; None runs stateless tasks.
        arguments: for ``mapper``.
    """
    every = _plan(source, batch_size)
    shards = []
    for shard in every:
        part = _part(out, shard)
        if part.exists():
            row_counts.read += shard["rows"]
            row_counts.kept += pq.read_metadata(part).num_rows
        else:
            shards.append(shard)
    if every and len(shards) < len(every):
        log(name, f"{len(every) - len(shards)} of {len(every)} parts are there already")
    if shards:
        _run(name, shards, row_counts, mapper, pool, {"out": str(out), "kind": kind}, arguments)
    for file in sorted(out.glob(REJECTED_PARTS)):
        row_counts.rejected += pq.read_table(file).to_pylist()


def _run(
    name: str,
    shards: list[Row],
    row_counts: RowCounts,
    mapper: Callable[..., Mapper],
    pool: Pool | None,
    write: Row,
    arguments: Row,
) -> None:
    dataset = ray.data.from_items(shards, override_num_blocks=len(shards))
    if pool is None:
        task = partial(_map_and_write, mapper=mapper(**arguments), **write)
        stats = dataset.map(task, num_cpus=1)
    else:
        actor: Any = _Actor  # Ray's annotation knows functions only
        stats = dataset.map(
            actor,
            fn_constructor_kwargs={"mapper": mapper, "arguments": arguments, **write},
            compute=ray.data.ActorPoolStrategy(
                min_size=min(pool.actors, len(shards)), max_size=min(pool.most or pool.actors, len(shards))
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
    total = sum(shard["rows"] for shard in shards)
    for done in _progress(name, stats.iter_rows(), total):
        row_counts.read += done["read"]
        row_counts.kept += done["kept"]


class _Actor:
    def __init__(self, mapper: Callable[..., Mapper], arguments: Row, out: str, kind: Any) -> None:
        self.write = partial(_map_and_write, mapper=mapper(**arguments), out=out, kind=kind)

    def __call__(self, shard: Row) -> Row:
        return self.write(shard)


def _plan(source: Artifact, batch_size: int) -> list[Row]:
    """Shards of at most ``batch_size`` rows, each with the file pieces (path, first row, rows) that it is made of."""
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


def _map_and_write(shard: Row, mapper: Mapper, out: str, kind: Any) -> Row:
    table: list[Row] = []
    for piece in shard["pieces"]:
        table += pq.read_table(piece["file"]).slice(piece["start"], piece["rows"]).to_pylist()
    try:
        kept, rejected = mapper(table)
    except Exception as error:
        error.add_note(f"shard {shard['name']}, rows {table[0]['id']} to {table[-1]['id']}")
        raise
    if rejected:  # first: the part's presence means that the shard is done
        write_rows(Path(out) / f"rejected-{shard['name']}.parquet", rejected, schema.Rejected)
    write_rows(_part(Path(out), shard), kept, kind)
    return {"read": len(table), "kept": len(kept)}


def _progress(name: str, stats: Iterable[Row], total: int) -> Iterator[Row]:
    done, kept = 0, 0
    with progress(name) as update:
        for row in stats:
            yield row
            done, kept = done + row["read"], kept + row["kept"]
            update(done, total, f"{done}/{total} rows read, {kept} written")
