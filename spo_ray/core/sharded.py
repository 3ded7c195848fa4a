"""Parameters in shards over ranks (PyTorch's FSDP2): the little that a step must know about them.

Sharded parameters and their gradients are DTensors. Backward passes sum gradients over the ranks by themselves, and
every forward and backward is a collective: all ranks must make the same passes in the same order. A sharded model
carries two things of its own: ``compute_dtype``, what its passes compute in, and ``full_precision()``, a context
manager in which they compute in the parameters' own type.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether some tensor is a shard."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, detached; it shares its memory."""
    tensor = tensor.detach()
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total(value: Tensor, like: Iterable[Tensor]) -> Tensor:
    """The sum over the ranks that hold shards of ``like`` of something computed from them; else the value itself."""
    meshes = {tensor.device_mesh for tensor in like if isinstance(tensor, DTensor)}
    for mesh in meshes:
        value = value.to(mesh.device_type, copy=True)  # offloaded shards are on the CPU, which NCCL does not serve
        dist.all_reduce(value, group=mesh.get_group())
    return value


def inside(model: nn.Module, function: Callable[[], T]) -> T:
    """Call a function as if it were the model's forward, so that its hooks gather sharded parameters around it."""
    own = model.__dict__.get("forward")
    model.__dict__["forward"] = function
    try:
        return model()
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own
