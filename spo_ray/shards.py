"""Row-mapping stages on Ray Data, written as Parquet shards by the tasks that made the rows.

Rows never pass through the driver: it only sees each shard's counts, which is also the progress report. A shard is
named by its first row, so a retried task replaces its own file and no row is written twice.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from spo_ray import rows
from spo_ray.run import Artifact, Ledger, say, write_rows

Row = dict[str, Any]
Mapped = tuple[list[Row], list[rows.Rejected]]
Mapper = Callable[[list[Row]], Mapped]
"""Rows in, (rows out, quarantined rows)."""
REPORT_EVERY_S = 2.0


class RowRejectedError(Exception):
    """Raised by a row function for a row that can't be used; the message is the reason."""


@dataclass(frozen=True)
class Pool:
    """Actors that keep state, such as a model, between batches."""

    actors: int
    cpus: float
    gpus: float = 0.0


def each_row(function: Callable[[Row], list[Row]]) -> Mapper:
    """A mapper from a function of one row to any number of rows."""

    def mapper(batch: list[Row]) -> Mapped:
        kept: list[Row] = []
        rejected: list[rows.Rejected] = []
        for row in batch:
            try:
                kept += function(row)
            except RowRejectedError as error:
                rejected.append({"id": row["id"], "reason": str(error), "excerpt": str(row)[:200]})
        return kept, rejected

    return mapper


def map_shards(
    name: str,
    source: Artifact,
    out: Path,
    ledger: Ledger,
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
        ledger: receives the counts.
        mapper: makes the row mapper inside a task or, with ``pool``, once in each actor.
        kind: row class of the output, from :mod:`spo_ray.rows`.
        batch_size: rows per call, and input rows per shard.
        pool: actors; None runs stateless tasks.
        arguments: for ``mapper``.

    """
    files = [part for part in source.parts if pq.read_metadata(part).num_rows]
    if not files:
        return
    total = sum(pq.read_metadata(part).num_rows for part in files)
    dataset = ray.data.read_parquet(files)
    if total > batch_size:  # otherwise reading and mapping are one task
        dataset = dataset.repartition(target_num_rows_per_block=batch_size)
    write = {"out": str(out), "kind": kind}
    if pool is None:
        stats = dataset.map_batches(
            partial(_map_and_write, mapper=mapper(**arguments), **write),
            batch_size=batch_size,
            batch_format="pyarrow",
            num_cpus=1,
        )
    else:
        stats = dataset.map_batches(
            _Actor,
            fn_constructor_kwargs={"mapper": mapper, "arguments": arguments, **write},
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=pool.actors),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
        )
    for done in _progress(name, stats.iter_rows(), total):
        ledger.read += done["read"]
        ledger.kept += done["kept"]
    for file in sorted(out.glob("rejected-*.parquet")):
        ledger.rejected += pq.read_table(file).to_pylist()
        file.unlink()


class _Actor:
    def __init__(self, mapper: Callable[..., Mapper], arguments: Row, out: str, kind: Any) -> None:
        self.write = partial(_map_and_write, mapper=mapper(**arguments), out=out, kind=kind)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.write(batch)


def _map_and_write(batch: pa.Table, mapper: Mapper, out: str, kind: Any) -> pa.Table:
    table = batch.to_pylist()
    kept, rejected = mapper(table)
    shard = hashlib.sha256(table[0]["id"].encode()).hexdigest()[:16]
    write_rows(Path(out) / f"part-{shard}.parquet", kept, kind)
    if rejected:
        write_rows(Path(out) / f"rejected-{shard}.parquet", rejected, rows.Rejected)
    return pa.Table.from_pylist([{"read": len(table), "kept": len(kept)}])


def _progress(name: str, stats: Iterator[Row], total: int) -> Iterator[Row]:
    done, kept, last = 0, 0, time.monotonic()
    for row in stats:
        yield row
        done, kept = done + row["read"], kept + row["kept"]
        if time.monotonic() - last > REPORT_EVERY_S and done < total:
            say(name, f"{done}/{total} rows read, {kept} written")
            last = time.monotonic()
