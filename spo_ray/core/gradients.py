"""Accumulation of weighted gradients, and context managers that change a model and restore it.

A gradient here is a list of tensors in the order of a list of parameters. All gradients are computed by ``backward``
into ``.grad``, because sharded parameters do not support ``autograd.grad``.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spo_ray.core.sharded import is_sharded, local, total

Gradients = list[Tensor]
Params = Sequence[Tensor]


class GradientAccumulator:
    """Weighted sum of gradients, filled by :func:`accumulate`; allocated with its first gradient."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.parts: list[Tensor | None] = [None] * len(params)

    def add(self, index: int, grad: Tensor, weight: float) -> None:
        """Add ``weight * grad`` to the sum of one parameter."""
        part = self.parts[index]
        if part is None:
            self.parts[index] = grad * weight
        else:
            part.add_(grad, alpha=weight)

    def take(self, index: int, grad: Tensor, weight: float) -> None:
        """Add like :meth:`add`, but reuse the gradient's memory, which the caller must not use any more."""
        if self.parts[index] is None:
            self.parts[index] = grad.mul_(weight)
        else:
            self.add(index, grad, weight)

    def add_all(self, grads: Gradients) -> None:
        """Add a gradient of all parameters; an empty list adds nothing."""
        for i, grad in enumerate(grads):
            self.add(i, grad, 1.0)

    def gradients(self) -> Gradients:
        """Return the sum; zeros for parameters without a gradient."""
        self.parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, self.parts, strict=True)]
        return [part for part in self.parts if part is not None]


def accumulate(values: Tensor, targets: Sequence[tuple[GradientAccumulator, Tensor]]) -> None:
    """Add the gradient of ``sum_i weights_i * values_i`` to each (sink, weights [B]) of ``targets``.

    All sinks have the same parameters, which must require gradients; ``.grad`` is not changed. A single value takes one
    backward for all targets, since their gradients differ by a factor; weights of zero take none. With sharded
    parameters each target takes a backward, because other ranks have other weights and a backward sums over ranks.
    """
    sharded = is_sharded(targets[0][0].params)
    targets = [(sink, weights.detach()) for sink, weights in targets if sharded or bool(weights.any())]
    if not targets:
        return
    with _own_grads(targets[0][0].params):
        if len(values) == 1 and len(targets) > 1 and not sharded:
            _distribute(values.sum(), [(sink, weights.item()) for sink, weights in targets])
        else:
            for i, (sink, weights) in enumerate(targets):
                _accumulate((values * weights).sum(), sink, retain=i < len(targets) - 1)


def _accumulate(value: Tensor, sink: GradientAccumulator, *, retain: bool) -> None:
    """Run one backward that adds to one sink."""
    for p, part in zip(sink.params, sink.parts, strict=True):
        p.grad = part
    value.backward(retain_graph=retain)
    sink.parts = [p.grad for p in sink.params]


def _distribute(value: Tensor, targets: Sequence[tuple[GradientAccumulator, float]]) -> None:
    """Run one backward that adds to several sinks, parameter by parameter so that no further whole gradient exists."""
    params = targets[0][0].params

    def deliver(index: int, p: Tensor) -> None:
        if p.grad is not None:
            *others, (last, last_weight) = targets
            for sink, weight in others:
                sink.add(index, p.grad, weight)
            last.take(index, p.grad, last_weight)
            p.grad = None

    def hook(index: int) -> Callable[[Tensor], None]:
        return lambda p: deliver(index, p)

    for p in params:
        p.grad = None
    handles = [p.register_post_accumulate_grad_hook(hook(i)) for i, p in enumerate(params)]
    try:
        value.backward()
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _own_grads(params: Params) -> Generator[None]:
    before = [p.grad for p in params]
    try:
        yield
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad


@contextmanager
def perturbed(params: Params, direction: Gradients, scale: float = 1.0) -> Generator[None]:
    """Set parameters to ``params + scale * direction`` in the context, and restore them afterwards bit for bit.

    ``direction`` is overwritten: its memory becomes the moved parameters, or holds the originals of sharded ones, which
    must be changed in place. Originals are kept because subtracting the move again would not be exact.
    """
    exchange = _exchange_shards if is_sharded(params) else _exchange
    back = exchange(params, direction, scale)
    torch.clear_autocast_cache()  # it holds casts of parameters and does not detect that they changed
    try:
        yield
    finally:
        back()
        torch.clear_autocast_cache()


def _exchange(params: Params, direction: Gradients, scale: float) -> Callable[[], None]:
    """Replace parameters by moved ones; return a function that puts the originals back."""
    origins = [p.data for p in params]
    for p, origin, d in zip(params, origins, direction, strict=True):
        d = d.to(origin.dtype)
        p.data = torch.add(origin, d, alpha=scale, out=d)

    def back() -> None:
        for p, origin in zip(params, origins, strict=True):
            p.data = origin

    return back


def _exchange_shards(params: Params, direction: Gradients, scale: float) -> Callable[[], None]:
    """Move sharded parameters in place; return a function that puts the originals back."""
    shards, kept = [local(p) for p in params], [local(d) for d in direction]
    for shard, d in zip(shards, kept, strict=True):
        new = torch.add(shard, d, alpha=scale)
        d.copy_(shard)
        shard.copy_(new)

    def back() -> None:
        for shard, origin in zip(shards, kept, strict=True):
            shard.copy_(origin)

    return back


def rounds_products() -> bool:
    """Return True if PyTorch may round the factors of float32 products, to TensorFloat-32 on a GPU."""
    return torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")


@contextmanager
def exact_products() -> Generator[bool]:
    """Do not round factors of float32 products in the context; yield True if that is a change."""
    changed, before = rounds_products(), torch.backends.cuda.matmul.fp32_precision
    if not changed:
        yield False
        return
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield True
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextmanager
def full_precision(model: nn.Module) -> Generator[bool]:
    """Compute in float32: autocast and TensorFloat-32 off, half-precision parameters as float32 copies.

    Differences of gradients are smaller than the rounding errors of half precision. Yields True if anything changes.
    """
    own = getattr(model, "full_precision", None) or partial(_whole_in_full_precision, model)  # or a sharded model's
    with exact_products() as rounded, own() as changed, exact_attention(model) if changed else nullcontext():
        yield changed or rounded


@contextmanager
def _whole_in_full_precision(model: nn.Module) -> Generator[bool]:
    half = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    device = next(model.parameters()).device.type
    changed = bool(half) or torch.is_autocast_enabled(device)
    origins, grads = [p.data for p in half], [p.grad for p in half]
    try:
        for p in half:
            p.grad = None
            p.data = p.data.float()
        with torch.autocast(device, enabled=False):
            yield changed
    finally:
        for p, origin, grad in zip(half, origins, grads, strict=True):
            p.data = origin
            p.grad = grad


@contextmanager
def exact_attention(model: nn.Module) -> Generator[None]:
    """Replace FlashAttention, which needs half precision, by PyTorch's attention, or ``eager`` for capped scores."""
    config: Any = getattr(model, "config", None)  # a Hugging Face model reads it in every pass
    name = getattr(config, "_attn_implementation", None) or ""
    if "flash" not in name:
        yield
        return
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    config._attn_implementation = "eager" if capped else "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = name


@contextmanager
def grad_only_for(params: Params, among: Params) -> Generator[None]:
    """Require gradients of ``params`` only, so that a backward computes no others ``among`` the parameters."""
    wanted = {id(p) for p in params}
    others = [p for p in among if id(p) not in wanted]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


@contextmanager
def deterministic(model: nn.Module, names: Sequence[str]) -> Generator[dict[str, nn.Parameter]]:
    """Turn off dropout and require gradients of the named parameters only; restore everything at the end.

    Raises:
        ValueError: the model has no parameter of that name.
    """
    every = dict(model.named_parameters())
    missing = [name for name in names if name not in every]
    if missing:
        raise ValueError(f"the model has no parameter {missing[0]!r} ({len(missing)} names are unknown)")
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in every.values()]
    rates: list[tuple[nn.Module, str, float]] = []
    wanted = {name: every[name] for name in names}
    chosen = {id(p) for p in wanted.values()}
    exact = all(p.dtype == torch.float64 for p in wanted.values())
    try:
        model.eval()
        for module, mode in modes:  # Hugging Face's layers use gradient checkpointing in training mode only
            # (not in float64: the recomputation in a backward is outside of KeepFloat64)
            module.training = mode and bool(getattr(module, "gradient_checkpointing", False)) and not exact
            for name, rate in _own_dropout(module) if module.training else ():  # dropout that is no module
                rates.append((module, name, rate))
                setattr(module, name, 0.0)
        for p in every.values():
            p.requires_grad_(id(p) in chosen)
        with torch.enable_grad(), KeepFloat64() if exact else nullcontext():
            yield wanted
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        for module, name, rate in rates:
            setattr(module, name, rate)


def _own_dropout(module: nn.Module) -> list[tuple[str, float]]:
    """Return (attribute, rate) of a module's functional dropout and layer dropout."""
    return [(name, value) for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]


class KeepFloat64(TorchFunctionMode):
    """Turn casts to float32 into casts to float64.

    Hugging Face models compute their norms in float32 whatever their own type is. That rounding of 1e-7 is larger than
    the differences that finite differences in float64 measure.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def add(to: Gradients, what: Gradients, scale: float = 1.0) -> None:
    """Add ``scale * what`` to ``to`` in place."""
    if to:
        torch._foreach_add_(to, what, alpha=scale)


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of all tensors as one vector, over all ranks if they are shards."""
    if not tensors:
        return 0.0
    value = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(local(t)) for t in tensors]))
    return total(value.double() ** 2, tensors).sqrt().item() if is_sharded(tensors) else value.item()
