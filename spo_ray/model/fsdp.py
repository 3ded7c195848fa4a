"""Fully sharded data parallelism (FSDP2) of models.

Each decoder layer is gathered for its forward and its backward, and freed afterwards; the rest (embeddings, final norm,
head) is gathered once for both. Shards are in the parameters' type, passes in the compute type, and gradients are
summed over the ranks in float32 (float64 for a float64 model).
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from spo_ray.core.lm_head import base_of


def shard(model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype, cpu_offload: bool = False) -> None:
    """Shard a Hugging Face model, with or without adapters, in place.

    Its modules can't be called alone any more. It gets the attributes ``compute_dtype`` and ``full_precision()``, see
    :mod:`spo_ray.core.sharded`.

    Args:
        model: the model; its parameters may be on the meta device.
        mesh: the ranks, in one dimension.
        compute_dtype: the type of forward and backward passes.
        cpu_offload: keep shards, their gradients and optimizer states in main memory.
    """
    policy = _policy(compute_dtype)
    # pinned memory only helps copies to a device
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)  # sums, because the losses are divided by global counts
        unit.set_force_sum_reduction_for_comms(True)  # Gloo supports no other
    whole: Any = model
    whole.register_forward_hook(_free)
    register_fsdp_forward_method(whole, "generate")
    whole.compute_dtype = compute_dtype
    whole.full_precision = partial(_full_precision, whole)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a causal language model.

    Raises:
        ValueError: the model has no decoder with ``layers``.
    """
    whole: Any = model
    base = base_of(whole)
    layers = getattr(base.get_decoder(), "layers", None) if hasattr(base, "get_decoder") else None
    if layers is None:
        raise ValueError(f"{type(base).__name__} has no decoder layers to shard: set train.sharding=none")
    return list(layers)


def load_shards(
    build: Callable[[str], nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    *,
    cpu_offload: bool = False,
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """Build a sharded model. Rank 0 reads the weights into main memory and sends the others their shards.

    Collective: call on all ranks. ``build(device)`` makes the model on ``cpu`` or, without reading weights, on
    ``meta``; ``prepare`` may change it before it is sharded.
    """
    source = build("cpu") if dist.get_rank() == 0 else None
    model = build("meta")
    prepare(model)
    shard(model, mesh, compute_dtype, cpu_offload)
    model.to_empty(device="cpu" if cpu_offload else mesh.device_type)
    state = source.state_dict() if source is not None else {}
    fill(model, state)
    buffers = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():  # some are in no state dict, such as rotary frequencies
        value = buffers[name].to(mesh.device_type) if buffers else torch.empty_like(buffer, device=mesh.device_type)
        dist.broadcast(value, 0)
        buffer.copy_(value)
    return model


def fill(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load rank 0's whole state dict into the shards of all ranks. Collective: call on all ranks."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict in main memory; of a sharded model gathered on rank 0, and empty on the other ranks.

    Collective: call on all ranks.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _free(model: Any, inputs: object, output: object) -> None:
    """Free the root's gathered parameters after a pass without gradients, which FSDP2 does not do itself."""
    if not torch.is_grad_enabled():
        model.reshard()


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _policy(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    reduce = torch.float64 if compute_dtype == torch.float64 else torch.float32
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce)


@contextmanager
def _full_precision(model: Any) -> Generator[bool]:
    """Run passes in float32 or float64 in the context; yield True if that is a change."""
    before = model.compute_dtype
    if before in (torch.float32, torch.float64):
        yield False
        return
    _set_compute_dtype(model, torch.float32)
    try:
        yield True
    finally:
        _set_compute_dtype(model, before)


def _set_compute_dtype(model: Any, dtype: torch.dtype) -> None:
    """Change the compute type of a sharded model through FSDP2's internals; it has no public function for this."""
    policy = _policy(dtype)
    for unit in _units(model):
        unit.reshard()
        state = unit._get_fsdp_state()
        state._mp_policy = policy
        for group in state._fsdp_param_groups:
            group.mp_policy = policy
            group._init_mp_dtypes()
            for parameter in group.fsdp_params:  # these buffers have the old type
                parameter.all_gather_outputs = []
                if hasattr(parameter, "_unsharded_param"):
                    del parameter._unsharded_param
    model.compute_dtype = dtype
