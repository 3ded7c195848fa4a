"""Rows for the workers: tables in Ray's shared memory, and the order in which training uses their rows."""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pyarrow as pa
import ray.train

from spo_ray.runtime.artifact import Artifact

Row = dict[str, Any]
BLOCK_ROWS = 4096


class RowTable:
    """Arrow table whose rows are read by number; only the rows asked for become Python objects."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Return rows in the order of their numbers."""
        return self.table.take(list(numbers)).to_pylist()

    @classmethod
    def of(cls, artifact: Artifact) -> "RowTable":
        """Read the rows of a stage from its files, in the order of their ids."""
        return cls(artifact.table())


def dataset(artifact: Artifact) -> ray.data.Dataset:
    """Put the rows of a stage into Ray's object store; the workers of a node share one copy.

    The dataset is materialised here: computing it later would need CPUs that the waiting workers may hold.
    """
    table = artifact.table()
    blocks = [table.slice(start, BLOCK_ROWS) for start in range(0, table.num_rows, BLOCK_ROWS)]
    return ray.data.from_arrow(blocks or [table])


@cache
def shared_table(name: str) -> RowTable:
    """Return a dataset of this Ray Train run by its name, without copying it."""
    batches = ray.train.get_dataset_shard(name).iter_batches(batch_size=None, batch_format="pyarrow")
    return RowTable(pa.concat_tables(list(batches)))


def epoch_batches(rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Yield global batches of row numbers: every row once per epoch, in batches whose sizes differ by at most one.

    They depend only on the seed, not on the world size, so that a step has the same batch after a restart.
    """
    rng = random.Random(seed)
    count = -(-rows // batch_size)
    for _ in range(epochs):
        order = rng.sample(range(rows), rows)
        yield from (order[i * rows // count : (i + 1) * rows // count] for i in range(count))
