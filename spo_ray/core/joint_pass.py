"""One backward pass that weights its sequences differently for LoRA adapters and for all other parameters.

The gradient of ``sum_i c_i * logp_i`` is a sum over sequences, and so is the gradient of every linear layer's weight:
``grad_output^T x``, summed over the rows of a batch. A backward with the weights c therefore also gives the adapters'
gradient for other weights d, if the rows of that product are scaled by ``d_i / c_i``.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spo_ray.core.gradients import GradientAccumulator


def lora_linears(model: nn.Module, params: Sequence[Tensor]) -> list[nn.Linear] | None:
    """Return the linear layers that hold ``params``, or None if some are not in a plain LoRA layer of PEFT.

    DoRA and other variants read the weights of their layers also outside of the layers' forward.
    """
    owners: dict[int, nn.Linear] = {}
    for layer in model.modules():
        parts = [getattr(layer, name, None) for name in ("lora_A", "lora_B")]
        for part in parts if not getattr(layer, "lora_variant", None) else []:
            for linear in part.values() if isinstance(part, nn.ModuleDict) else ():
                if type(linear) is nn.Linear and "forward" not in vars(linear):
                    owners |= {id(p): linear for p in linear.parameters()}
    linears = {id(p): owners.get(id(p)) for p in params}
    found = {id(linear): linear for linear in linears.values() if linear is not None}
    return None if None in linears.values() else list(found.values())


def seeds(wanted: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(c, d / c)`` for weights d = ``wanted`` of the adapters and d + ``extra`` of the other parameters.

    Where c would be 0 or nearly, it is moved away from 0 by less than the rounding of ``extra``, because d / c must be
    finite. Sequences without any weight (padding rows) get 0 and 0.
    """
    total = wanted + extra
    smallest = torch.finfo(total.dtype).eps * extra.abs()
    total = torch.where(total.abs() < smallest, torch.copysign(smallest, total), total)
    return total, torch.where(total == 0, 0.0, wanted / total)


@dataclass
class JointPass:
    """Settings of passes over both sides of pairs with one backward for the base loss and for L_SFT."""

    penalty: float
    """Weight of L_SFT in the gradient of theta; phi gets none of it."""
    n_backbone: int
    """Number of theta's parameters, which come first."""
    adapters: list[nn.Linear] | None
    """Linear layers of phi's parameters; None if rows cannot be scaled there, so that L_SFT needs its own sum.

    Empty without L_SFT, which alone needs the scaling.
    """

    def add_penalty(self, total: GradientAccumulator, sft: GradientAccumulator) -> None:
        """Add ``penalty`` times the separate sum of L_SFT, if there is one, to theta's part of ``total``."""
        for i, grad in enumerate(sft.parts[: self.n_backbone]):
            if grad is not None:
                total.add(i, grad, self.penalty)


class RowRatios:
    """Ratios of the rows of a batch in the weight gradients of linear layers, see :func:`scaled_rows`."""

    def __init__(self, linears: Sequence[nn.Linear], shape: tuple[int, ...]) -> None:
        self.missing = {id(linear) for linear in linears}
        self.shape = shape
        self.foreign = False
        self.ratios: Tensor | None = None
        """Ratios [B], set between forward and backward; None scales nothing."""

    @property
    def complete(self) -> bool:
        """True if every layer was called, and always with the batch's own rows: else the ratios must not be used."""
        return not self.missing and not self.foreign

    def forward(self, linear: nn.Linear, inputs: Tensor) -> Tensor:
        """Compute the layer's output, as its own forward does, also under autocast."""
        self.missing.discard(id(linear))
        weight, bias, device = linear.weight, linear.bias, inputs.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            inputs, weight, bias = inputs.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        # The range of float16 is too small for gradients that are scaled up by a large ratio.
        self.foreign |= inputs.dtype == torch.float16 or tuple(inputs.shape[:-1]) != self.shape
        return _RowScaledLinear.apply(inputs, weight, bias, lambda: self.ratios)


@contextmanager
def scaled_rows(linears: Sequence[nn.Linear], shape: tuple[int, ...]) -> Generator[RowRatios]:
    """Scale rows in the weight gradients of ``linears`` while the context lasts; it must include the backward.

    ``shape`` is [B, T] of the batch. (Experts of a mixture see tokens without their rows, for example.)
    """
    rows = RowRatios(linears, shape)
    for linear in linears:
        vars(linear)["forward"] = partial(rows.forward, linear)
    try:
        yield rows
    finally:
        for linear in linears:
            del vars(linear)["forward"]


class _RowScaledLinear(torch.autograd.Function):
    """Linear layer whose backward multiplies each row by a ratio, for its weight and bias alone."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, ratios: Callable[[], Tensor | None]
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.ratios = ratios
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        grad_inputs = grad @ weight if ctx.needs_input_grad[0] else None
        ratios = ctx.ratios()
        if ratios is not None:
            scale = ratios.to(grad.dtype)[:, None, None]
            # The narrow side of the product is the cheaper one to scale; a bias has no other side.
            if inputs.shape[-1] < grad.shape[-1] and not ctx.needs_input_grad[2]:
                inputs = inputs * scale
            else:
                grad = grad * scale
        grad_weight = grad.flatten(0, -2).T @ inputs.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_inputs, grad_weight, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None, None
