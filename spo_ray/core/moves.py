"""Parameters that move along a direction, in passes that do not round the move away.

In half precision the sum ``W + shift * V`` of a matrix and its direction would be rounded by more than the shift is.
A linear layer therefore computes ``[W, V] [x, shift * x]``, which is rounded once, after the sum. Passes may also carry
tangents, the derivatives along the direction, by PyTorch's forward-mode differentiation.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spo_ray.core.gradients import Gradients, perturbed

Pair = tuple[Tensor, Tensor | None]
"""A value and its tangent; None is a tangent of 0."""
Weights = Callable[[str, torch.dtype], tuple[Any, Any]]
"""Function of a parameter's name and a type: the parameter or None, and its direction or None."""


@contextmanager
def shifted(model: nn.Module, params: Sequence[Tensor], directions: Gradients, scale: float) -> Generator[None]:
    """Compute a model at ``params + scale * directions`` without rounding the sum for its linear layers and embeddings.

    For ordinary passes, with gradients as usual. The rest of the parameters move as in
    :func:`spo_ray.core.gradients.perturbed`, and their ``directions`` are overwritten.
    """
    moves = Moves(model, params, directions, params, scale)
    modules = [module for module in model.modules() if moves.kept_apart(module)]
    apart = {id(p) for module in modules for p in module._parameters.values()}
    rest = [(p, d) for p, d in zip(params, directions, strict=True) if id(p) not in apart]
    with perturbed([p for p, _ in rest], [d for _, d in rest], scale), moves.applied(modules, tangents=False):
        yield


class Moves:
    """Directions of a model's parameters, and how its modules use them."""

    def __init__(
        self, model: nn.Module, moving: Sequence[Tensor], directions: Gradients, wanted: Sequence[Tensor], shift: float
    ) -> None:
        self.shift = shift
        along = {id(p): d for p, d in zip(moving, directions, strict=True)}
        index = {id(p): i for i, p in enumerate(wanted)}
        self.directions: dict[int, dict[str, Tensor]] = {}
        self.wanted: dict[int, dict[str, int]] = {}
        for module in model.modules():
            own = module._parameters
            self.directions[id(module)] = {name: along[id(p)] for name, p in own.items() if id(p) in along}
            self.wanted[id(module)] = {name: index[id(p)] for name, p in own.items() if id(p) in index}

    def kept_apart(self, module: nn.Module) -> bool:
        """Return True if a module moves and can compute with its weight and its direction separately."""
        return type(module) in FORWARDS and "weight" in self.directions[id(module)] and "forward" not in vars(module)

    @contextmanager
    def applied(
        self, modules: Iterable[nn.Module], kept: dict[Any, Tensor] | None = None, *, tangents: bool = True
    ) -> Generator[None]:
        """Let modules compute with their directions, inside a level of forward mode or, without tangents, outside.

        ``kept`` keeps gathered directions for the next time.
        """
        with ExitStack() as undo:
            for module in modules:
                own = self.directions[id(module)]
                if self.kept_apart(module):
                    weights, forward = self._weights(module, kept), FORWARDS[type(module)]
                    vars(module)["forward"] = partial(forward, module, weights, self.shift, tangents)
                    undo.callback(vars(module).pop, "forward")
                    continue
                for name, direction in own.items():
                    p = module._parameters[name]
                    assert p is not None
                    along = _gathered(direction, p.dtype)
                    value = p if name in self.wanted[id(module)] else p.detach()
                    if self.shift:
                        along = _single(along)
                        value = _single(value) + self.shift * along
                    vars(module)["_parameters"][name] = fwd.make_dual(value, along)
                    undo.callback(module._parameters.__setitem__, name, p)
            yield

    def _weights(self, module: nn.Module, kept: dict[Any, Tensor] | None) -> Weights:
        own, wanted = self.directions[id(module)], self.wanted[id(module)]
        kept = {} if kept is None else kept

        def of(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
            p, direction, key = module._parameters[name], own.get(name), (id(own.get(name)), dtype)
            if direction is not None and key not in kept:
                kept[key] = _gathered(direction, dtype)
            value = p if p is None or name in wanted else p.detach()
            return None if value is None else value.to(dtype), kept.get(key)

        return of


def _linear(module: nn.Linear, weights: Weights, shift: float, tangents: bool, inputs: Tensor) -> Tensor:
    """Compute a linear layer whose weight W, and perhaps bias, move along V.

    In half precision a sum of two outputs would be rounded by more than the shift changes it. Therefore one product of
    ``[W, V]`` with ``[x, shift * x]`` gives the output, and one with ``[x', x + shift * x']`` its tangent.
    """
    values, changes = unpacked(inputs) if tangents else (inputs, None)
    device, dtype = values.device.type, module.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    values, (weight, along), (bias, bias_along) = values.to(dtype), weights("weight", dtype), weights("bias", dtype)
    changes = None if changes is None else changes.to(dtype)
    if not shift:
        moved = F.linear(values, along, bias_along)
        return fwd.make_dual(
            F.linear(values, weight, bias), moved if changes is None else moved + F.linear(changes, weight)
        )
    columns = [weight, along, *(b[:, None] for b in (bias, bias_along) if bias_along is not None)]
    both = torch.cat(columns, dim=1)

    def product(first: Tensor, second: Tensor, *factors: float) -> Tensor:
        ones = [torch.full_like(first[..., :1], factor) for factor in factors] if bias_along is not None else []
        return F.linear(torch.cat([first, second, *ones], dim=-1), both)

    outputs = product(values, shift * values, 1.0, shift)
    outputs = outputs if bias is None or bias_along is not None else outputs + bias
    if not tangents:
        return outputs
    changed = (
        F.linear(values, along, bias_along) if changes is None else product(changes, values + shift * changes, 0, 1)
    )
    return fwd.make_dual(outputs, changed)


def _embedding(module: nn.Embedding, weights: Weights, shift: float, tangents: bool, ids: Tensor) -> Tensor:
    """Look up an embedding that moves.

    With tangents a shift is added in single precision. Attention that is not made of elementary operations refuses
    queries in another type than its values, so that other passes round the shift of half-precision embeddings.
    """
    weight, along = weights("weight", module.weight.dtype)
    outputs, moved = (F.embedding(ids, table, module.padding_idx) for table in (weight, along))
    if shift:
        outputs, moved = _single(outputs) + shift * _single(moved), _single(moved)
    return fwd.make_dual(outputs, moved) if tangents else outputs.to(weight.dtype)


def _single(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Linear: _linear, nn.Embedding: _embedding}
"""Forward passes that keep the shift apart. The parameters of other modules are moved by it."""


def dual(pair: Pair) -> Tensor:
    """Return a tensor that carries its tangent, in a level of forward mode."""
    return pair[0] if pair[1] is None else fwd.make_dual(*pair)


def unpacked(tensor: Tensor) -> Pair:
    """Return a tensor's value and its tangent, in a level of forward mode."""
    value, tangent = fwd.unpack_dual(tensor)
    return value, tangent


def _gathered(direction: Tensor, dtype: torch.dtype) -> Tensor:
    direction = direction.to(dtype)
    return direction.full_tensor() if isinstance(direction, DTensor) else direction
