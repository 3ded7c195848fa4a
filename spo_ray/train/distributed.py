"""One rank of a data-parallel group, and its collectives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")


@dataclass(frozen=True)
class Distributed:
    """Rank of a data-parallel group. Every method that communicates must be called on all ranks."""

    index: int
    """Rank, from 0."""
    size: int
    """World size."""
    device: torch.device

    @classmethod
    def current(cls) -> "Distributed":
        """Return the rank of the current Ray Train worker."""
        context = ray.train.get_context()
        return cls(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

    @property
    def mesh(self) -> DeviceMesh:
        """One-dimensional device mesh over all ranks."""
        return init_device_mesh(self.device.type, (self.size,))

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors in place over the ranks."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def largest(self, value: int) -> int:
        """Return the largest of all ranks' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return all ranks' items, in the order of the ranks."""
        if self.size == 1:
            return list(items)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch on this rank's device."""
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def shard_with_padding(self, items: Sequence[T]) -> tuple[list[T], list[bool]]:
        """Split items over the ranks; return this rank's items and a mask that is False for padding.

        All ranks get the same number of items, so that they make the same collective calls; padding repeats the first.
        """
        own = list(items[self.index :: self.size])
        valid = [True] * len(own)
        while items and len(own) < -(-len(items) // self.size):
            own.append(items[0])
            valid.append(False)
        return own, valid
