"""Feeding workers: tables that Ray Data keeps in shared memory, and the order in which their rows are used."""

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
    """Rows by their number; Arrow, of which Python sees only what it asks for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def rows(self, numbers: Sequence[int]) -> list[Row]:
        """Some rows, in the order of the numbers."""
        return self.table.take(list(numbers)).to_pylist()

    @classmethod
    def of(cls, artifact: Artifact) -> "RowTable":
        """A stage's rows in the order of their ids, read from its files."""
        return cls(artifact.table())


def dataset(artifact: Artifact) -> ray.data.Dataset:
    """A stage's rows in the object store: one copy on each node, whatever the number of workers there.

    It is made whole here and now. A dataset that is computed while workers wait for it needs CPUs that they may hold.
    """
    table = artifact.table()
    blocks = [table.slice(start, BLOCK_ROWS) for start in range(0, table.num_rows, BLOCK_ROWS)]
    return ray.data.from_arrow(blocks or [table])


@cache
def shared_table(name: str) -> RowTable:
    """A dataset of this Ray Train run by its name, without copying it."""
    batches = ray.train.get_dataset_shard(name).iter_batches(batch_size=None, batch_format="pyarrow")
    return RowTable(pa.concat_tables(list(batches)))


def epoch_batches(rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Global batches of row numbers: every row exactly once an epoch, in batches whose sizes differ by one at most.

    They depend on the seed alone, not on the number of workers, so that a step's batch is the same after a restart.
    """
    rng = random.Random(seed)
    count = -(-rows // batch_size)
    for _ in range(epochs):
        order = rng.sample(range(rows), rows)
        yield from (order[i * rows // count : (i + 1) * rows // count] for i in range(count))
