"""Helpers for parameters that are sharded over ranks by PyTorch's FSDP2.

Sharded parameters and their gradients are DTensors. Every forward and backward is a collective: all ranks must make the
same passes in the same order, and a backward sums the gradients over the ranks. A sharded model has two attributes
more: ``compute_dtype``, the type of its passes, and ``full_precision()``, a context manager for passes in the
parameters' own type.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return True if at least one tensor is a shard."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """Return the part that this rank holds, detached, in the same memory."""
    tensor = tensor.detach()
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total(value: Tensor, like: Iterable[Tensor]) -> Tensor:
    """Sum a value over the ranks that hold shards of ``like``; return it unchanged if there are no shards."""
    meshes = {tensor.device_mesh for tensor in like if isinstance(tensor, DTensor)}
    for mesh in meshes:
        value = value.to(mesh.device_type, copy=True)  # offloaded shards are on the CPU, which NCCL does not support
        dist.all_reduce(value, group=mesh.get_group())
    return value


def inside(model: nn.Module, function: Callable[[], T]) -> T:
    """Call a function in place of the model's forward, so that the model's hooks gather its sharded parameters."""
    own = model.__dict__.get("forward")
    model.__dict__["forward"] = function
    try:
        return model()
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own
