"""One training process among the others."""

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
    """One worker of a data-parallel group."""

    index: int
    size: int
    device: torch.device

    @classmethod
    def current(cls) -> "Distributed":
        """That of the Ray Train worker that asks."""
        context = ray.train.get_context()
        return cls(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())

    @property
    def mesh(self) -> DeviceMesh:
        """All ranks, in one dimension."""
        return init_device_mesh(self.device.type, (self.size,))

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sum in place over the ranks."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, items: Sequence[T]) -> list[T]:
        """All ranks' items, in the order of the ranks."""
        if self.size == 1:
            return list(items)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch on this rank's device."""
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def shard_with_padding(self, items: Sequence[T]) -> tuple[list[T], list[bool]]:
        """Of what all ranks work on together, the part of this one, and which of it counts.

        The parts make up the whole, and are equally long: where it can't be divided, an item that does not count fills
        up, so that all ranks make the same passes.
        """
        own = list(items[self.index :: self.size])
        valid = [True] * len(own)
        while items and len(own) < -(-len(items) // self.size):
            own.append(items[0])
            valid.append(False)
        return own, valid
