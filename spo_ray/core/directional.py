"""Exact gradient of a directional derivative: of ``D = d/dt sum_i c_i * logp_i(p + t * d)`` at ``t = shift``.

D is the derivative of weighted log-probabilities along a direction d of some parameters p; its gradient is a product of
d with second derivatives. The forward pass carries pairs (value, tangent) through the model by PyTorch's forward-mode
differentiation, and the backward pass goes through both. Nothing is subtracted, so this also holds in half precision,
where a difference of two gradients is lost in rounding.

The decoder runs layer by layer. With ``recompute`` only the inputs of layers are kept, and each layer is computed again
for its backward, as in gradient checkpointing. Sharded parameters are gathered for one layer at a time.

Cost in units of a forward of one sequence: 6, or 8 with a shift; the recomputation adds 3 or 4.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torch.overrides import TorchFunctionMode

from spo_ray.core.gradients import GradientAccumulator, Gradients, exact_attention
from spo_ray.core.lm_head import Head, call, find_head
from spo_ray.core.logps import IGNORE, chunk_size
from spo_ray.core.moves import Moves, Pair, dual, unpacked

Wanted = dict[int, Tensor]
"""Parameters by their place in the gradient."""


class UnsupportedError(Exception):
    """A model through which no exact derivative is possible; the message says why."""


class DirectionalDerivative:
    """The derivative D of sequences' weighted log-probabilities along a direction, and its gradient."""

    def __init__(
        self,
        model: nn.Module,
        moving: Sequence[Tensor],
        directions: Gradients,
        sink: GradientAccumulator,
        *,
        shift: float = 0.0,
        chunk_tokens: int | None = None,
    ) -> None:
        """Prepare passes.

        Args:
            model: a Hugging Face causal language model, with or without PEFT adapters, whole or sharded.
            moving, directions: the parameters that move, and their directions.
            sink: receives the gradient for its parameters.
            shift: the place along the direction at which D is taken.
            chunk_tokens: see :func:`spo_ray.core.logps.token_logps`.
        """
        self.model, self.sink, self.chunk_tokens = model, sink, chunk_tokens
        self.moves = Moves(model, moving, directions, sink.params, shift)

    def of(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, weights: Tensor, *, recompute: bool = False
    ) -> float:
        """Return D of sequences [B, T] with weights [B], and add its gradient.

        With ``recompute`` layers are computed again in the backward, which takes less memory.

        Raises:
            UnsupportedError: an operation has no derivative in forward mode, or decoder and head are unknown.
        """
        head = find_head(self.model, input_ids)
        if head is None:
            raise UnsupportedError("its logits are not an output embedding of its decoder's hidden states")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        mask = labels[:, 1:] != IGNORE
        targets, tokens = labels[:, 1:][mask], weights[:, None].expand(mask.shape)[mask]
        layers = getattr(head.decoder, "layers", None)
        stack = _LayerStack(self, layers if isinstance(layers, nn.ModuleList) else [], recompute)
        inner = {id(module) for layer in stack.layers for module in layer.modules()}
        outside = [module for module in self.model.modules() if id(module) not in inner]
        try:
            with exact_attention(self.model), Elementary(), _unsharded(self.model):
                wanted, kept = self.wanted(outside), dict[Any, Tensor]()
                with fwd.dual_level(), self.moves.applied(outside, kept), stack.installed(head.decoder):
                    last = unpacked(call(head.decoder, **inputs)[0][:, :-1][mask])
                value, grads = self._through_head(head, last, targets, tokens, outside, kept)
                stack.backward(last, grads, wanted)
                return value
        except NotImplementedError as error:
            raise UnsupportedError(str(error).splitlines()[0]) from error
        finally:
            stack.runs.clear()  # they refer to the stack, which would keep their graphs until a garbage collection
            torch.clear_autocast_cache()  # it may hold casts that belong to the graph of this pass

    def _through_head(
        self,
        head: Head,
        last: Pair,
        targets: Tensor,
        tokens: Tensor,
        outside: Sequence[nn.Module],
        kept: dict[Any, Tensor],
    ) -> tuple[float, list[Tensor | None]]:
        """Return D of the tokens, and its gradients with respect to hidden states [N, D] and their tangents.

        With logits z, tangents z' and probabilities p, a token's D is ``z'_target - sum_v p_v z'_v``.
        """
        grads = [None if t is None else torch.zeros_like(t) for t in last]
        size = chunk_size(len(targets), getattr(head.output, "out_features", 2**17), self.chunk_tokens)
        wanted, total, sums = self.wanted(outside), 0.0, Wanted()
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            part = _leaves((last[0][rows], None if last[1] is None else last[1][rows]))
            with fwd.dual_level(), self.moves.applied(outside, kept):
                logits, tangent = unpacked(head.logits(dual(part)))
            if tangent is None:
                continue
            logits, tangent = (t if t.dtype == torch.float64 else t.float() for t in (logits, tangent))
            mean = (logits.softmax(-1) * tangent).sum(-1)
            part_value = (tokens[rows] * (tangent.gather(1, targets[rows, None])[:, 0] - mean)).sum()
            total += part_value.item()
            of_part, found = gradients_of((part_value,), (None,), part, wanted)
            for whole, grad in zip(grads, of_part, strict=True):
                if whole is not None and grad is not None:
                    whole[rows] = grad
            for index, grad in found.items():
                sums[index] = sums[index].add_(grad) if index in sums else grad.to(self.sink.params[index].dtype)
        self.collect(sums)  # once, because ranks differ in their chunks, and shards are summed over ranks
        return total, grads

    def backward(
        self,
        outputs: Sequence[Tensor | None],
        grads: Sequence[Tensor | None],
        inputs: Sequence[Tensor | None],
        wanted: Wanted,
    ) -> list[Tensor | None]:
        """Add the gradients of wanted parameters; return those of the inputs, None where there is none."""
        of_inputs, found = gradients_of(outputs, grads, inputs, wanted)
        self.collect(found)
        return of_inputs

    def collect(self, found: Wanted) -> None:
        """Add gradients to the sum; collective if parameters are sharded."""
        for index, grad in found.items():
            self.sink.take(index, _sharded_like(grad, self.sink.params[index]), 1.0)

    def wanted(self, modules: Iterable[nn.Module]) -> Wanted:
        """Return the wanted parameters of modules, as they are now."""
        owned = ((i, module, name) for module in modules for name, i in self.moves.wanted[id(module)].items())
        return {i: getattr(module, name) for i, module, name in owned}


def gradients_of(
    outputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    wanted: Wanted,
) -> tuple[list[Tensor | None], Wanted]:
    """Return the gradients of inputs, None where there is none, and those of wanted parameters."""
    ends = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and o.requires_grad]
    starts = [*(i for i in inputs if i is not None), *wanted.values()]
    if not ends or not starts:
        return [None] * len(inputs), {}
    found = list(torch.autograd.grad([o for o, _ in ends], starts, [g for _, g in ends], allow_unused=True))
    of_inputs = [None if i is None else found.pop(0) for i in inputs]
    return of_inputs, {i: grad for i, grad in zip(wanted, found, strict=True) if grad is not None}


class _LayerStack:
    """Decoder layers that run one by one, and their backward."""

    def __init__(self, owner: DirectionalDerivative, layers: Iterable[nn.Module], recompute: bool) -> None:
        self.owner, self.layers, self.recompute, self.runs = owner, list(layers), recompute, list[_Run]()

    @contextmanager
    def installed(self, decoder: nn.Module) -> Generator[None]:
        """Let the decoder call stand-ins in place of its layers, without the layers' hooks."""
        if not self.layers:
            yield
            return
        before = decoder._modules["layers"]
        decoder._modules["layers"] = nn.ModuleList(_StandIn(layer, self.run) for layer in self.layers)
        try:
            yield
        finally:
            decoder._modules["layers"] = before

    def run(self, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer; its result has a graph of its own.

        Raises:
            UnsupportedError: the layer depends on earlier layers through more than the hidden states.
        """
        if any(fwd.unpack_dual(t).tangent is not None for t in _tensors((args, kwargs))):
            raise UnsupportedError(f"{type(layer).__name__} takes more from earlier layers than hidden states")

        def forward(inputs: Pair) -> Any:
            with self.owner.moves.applied(layer.modules()):
                return layer.forward(dual(inputs), *args, **kwargs)

        arrived = unpacked(hidden)
        inputs = _leaves(arrived)
        with _unsharded(layer), torch.set_grad_enabled(not self.recompute):
            result = forward(inputs)
        outputs = unpacked(_hidden(result))
        top = _leaves(outputs)
        self.runs.append(_Run(layer, forward, arrived, inputs, None if self.recompute else outputs, top))
        return (dual(top), *result[1:]) if isinstance(result, tuple) else dual(top)

    def backward(self, last: Pair, grads: Sequence[Tensor | None], outside: Wanted) -> None:
        """Go back from the decoder's last hidden states, whose gradients are given, to its first operations."""
        owner = self.owner
        while self.runs:
            run = self.runs.pop()
            grads = owner.backward(last, grads, run.top, outside)
            with _unsharded(run.layer):
                outputs = run.outputs
                if outputs is None:
                    with fwd.dual_level():
                        outputs = unpacked(_hidden(run.forward(run.inputs)))
                grads = owner.backward(outputs, grads, run.inputs, owner.wanted(run.layer.modules()))
            last = run.arrived
        owner.backward(last, grads, (None, None), outside)


def _hidden(result: Any) -> Tensor:
    """Return the hidden states among a layer's results, of which they are the first."""
    return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class _Run:
    """A layer's forward pass."""

    layer: nn.Module
    forward: Callable[[Pair], Any]
    arrived: Pair
    """Hidden states from what comes before, with their graph."""
    inputs: Pair
    """The same, detached."""
    outputs: Pair | None
    """None: to be computed again."""
    top: Pair
    """Outputs, detached, as inputs of what follows."""


class _StandIn(nn.Module):
    """Takes a layer's place in its decoder."""

    def __init__(self, layer: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.run = (layer,), run  # in a tuple, which is not searched for modules

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"][0], name)  # what decoders ask their layers for

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.layer[0], hidden, args, kwargs)


class Elementary(TorchFunctionMode):
    """Compute softmax, attention and norms from elementary operations.

    PyTorch's softmax has no reverse derivative of its forward derivative, its fused attention no second one, and of its
    fused norms it would be wrong, because the forward derivative takes mean and variance for constants.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return ELEMENTARY.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    inputs: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    values = inputs if inputs.dtype == torch.float64 else inputs.float()
    return _affine(_root_mean_square(values - values.mean(dims, keepdim=True), dims, eps), weight, bias, inputs.dtype)


def _rms_norm(inputs: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    values = inputs if inputs.dtype == torch.float64 else inputs.float()
    eps = torch.finfo(inputs.dtype).eps if eps is None else eps
    return _affine(_root_mean_square(values, tuple(range(-len(shape), 0)), eps), weight, None, inputs.dtype)


def _root_mean_square(values: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return values * (values.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(values: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    values = values if weight is None else values * weight
    return (values if bias is None else values + bias).to(dtype)


def _softmax(scores: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    scores = scores if dtype is None else scores.to(dtype)
    if scores.dtype in (torch.bfloat16, torch.float16):
        return _softmax(scores.float(), dim).to(scores.dtype)
    top = fwd.unpack_dual(scores).primal.detach().amax(dim, keepdim=True)
    exponentials = (scores - top).exp()
    return exponentials / exponentials.sum(dim, keepdim=True)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if query.dtype != torch.float64:  # as fused attention: exponentials would magnify the rounding of scores
        query, key = query.float(), key.float()
    with torch.autocast(query.device.type, enabled=False):
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _softmax(scores, -1).to(value.dtype) @ value


ELEMENTARY = {
    F.softmax: _softmax,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}


def _leaves(pair: Pair) -> Pair:
    """Return copies without a graph that require gradients."""
    value, tangent = (None if t is None else t.detach().requires_grad_() for t in pair)
    assert value is not None
    return value, tangent


def _tensors(value: Any) -> Generator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


@contextmanager
def _unsharded(module: nn.Module) -> Generator[None]:
    """Gather a module's own sharded parameters in the context, if it has any."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def _sharded_like(grad: Tensor, param: Tensor) -> Tensor:
    """Return a gradient in a parameter's type; of a sharded parameter this rank's shard of the sum over ranks."""
    grad = grad.to(param.dtype)
    if not isinstance(param, DTensor):
        return grad
    own = DTensor.from_local(grad, param.device_mesh, [Partial()], run_check=False)
    return own.redistribute(placements=param.placements)
