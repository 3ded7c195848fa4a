"""The SPO step: Algorithm 1 of arXiv 2507.07723, terms (a) to (e).

One call gives the gradient of the bilevel objective ``F = L_pref + lambda * (L_SFT - L_SFT*(phi)) + gamma * R``
(equation 9) for the backbone theta and the adapters phi:

    phi:    (a) grad L_pref  + (b) lambda * [grad L_SFT(theta, phi) - grad L_SFT(theta_hat, phi)]  + gamma * grad R
    theta:  (c) grad L_pref  + (d) lambda * grad L_SFT(theta, phi)                                 + (e) gamma * grad R

``theta_hat`` is theta after K steps of size eta on L_SFT (equation 11), and ``R = max(0, ||g_w|| - ||g_l||)``
(equation 77) with ``g = grad log pi(y|x)``. With lambda = gamma = K = 0 a step is the base loss alone, so every
preference method trains through this one function.

Gradients are means over the pairs of the batch, summed over data-parallel ranks by ``all_reduce``.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import Metrics, SftReduction, bind

AllReduce = Callable[[Sequence[Tensor]], None]
"""Sums tensors in place over data-parallel ranks."""
Gradients = list[Tensor]

INNER_STEP = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-4, torch.float16: 1e-4}
"""Relative move ||d|| / ||theta|| of term (b)'s rescaled difference: eta itself moves theta by less than rounding.

Shorter moves drown in rounding, longer ones leave the linear range: on a 0.4M-parameter model the cosine with float64's
term (b) is 1.000 in float32 at 1e-5 and 0.95 at 1e-3; under bfloat16 autocast 0.998 at 3e-4 and 0.16 at 1e-5.
"""
HESSIAN_STEP = {torch.float64: 1e-8, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Relative move of the finite-difference Hessian-vector products in grad R."""


def spo_gradients(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    backbone: Sequence[str],
    adapters: Sequence[str],
    base: str | Callable[..., Any] = "dpo",
    beta: float,
    lambda_sft: float,
    gamma: float,
    inner_steps: int,
    eta: float,
    sft_reduction: SftReduction = "sum",
    norm_scope: Literal["all", "backbone", "adapters"] = "all",
    hinge: Literal["batch", "pair"] = "batch",
    inner_mode: Literal["rescaled", "literal"] = "rescaled",
    margin: float = 0.0,
    all_reduce: AllReduce | None = None,
) -> tuple[dict[str, Tensor], Metrics]:
    """Gradient of SPO's objective on one batch of pairs.

    Args:
        model: a Hugging Face causal language model, with or without PEFT adapters.
        batch: ``{chosen,rejected}_{input_ids,labels,attention_mask}`` [B, T] and ``ref_{chosen,rejected}_logps`` [B].
        backbone: names of theta's parameters.
        adapters: names of phi's parameters.
        base: L_pref, a name in :data:`spo_ray.core.losses.LOSSES` or a callable of the four log-probability tensors
            (policy chosen, policy rejected, reference chosen, reference rejected) that returns the mean loss or
            ``(loss, metrics)``. ``beta``, ``margin``, ``chosen_lengths``, ``rejected_lengths`` and
            ``mean_chosen_length`` (over all ranks) are passed by keyword where its signature has them.
        beta: the base loss's inverse temperature.
        lambda_sft: weight of the value-function penalty.
        gamma: weight of R.
        inner_steps: K; 0 means theta_hat = theta, and (b) vanishes.
        eta: step size of the lower level.
        sft_reduction: L_SFT as the mean of sequence sums (equation 72), or per completion token of the batch.
        norm_scope: the parameters whose gradient norms make R.
        hinge: R on the gradient of the batch-mean log-probability, or the mean of every pair's own R.
        inner_mode: (b) as a difference over a longer step along theta_hat - theta, scaled back (first-order equal, and
            out of rounding's reach), or literally at theta_hat.
        margin: for base losses that have one.
        all_reduce: sums tensors in place over the ranks of a data-parallel group.

    Returns:
        ``(grads, metrics)``: the gradient of F for every listed parameter by name, and floats; ``logps/*`` and
        ``rewards/*`` are means over this rank's pairs, ``spo/*`` belong to the whole batch.

    Raises:
        ValueError: an unknown base, option or parameter name, a negative ``inner_steps``, or an empty completion.
    """
    _check(inner_steps, norm_scope, hinge, inner_mode, sft_reduction)
    with _scored(model, [*backbone, *adapters]) as params:
        step = _Step(model, list(params.values()), len(backbone), all_reduce or _alone, sft_reduction)
        chosen, rejected = _Side.of(batch, "chosen"), _Side.of(batch, "rejected")
        total, metrics = step.base_and_sft(chosen, rejected, batch, bind(base, beta=beta, margin=margin), lambda_sft)
        if lambda_sft and inner_steps and adapters:
            metrics |= step.add_value_term(total, chosen, lambda_sft, inner_steps, eta, inner_mode == "literal")
        if gamma:
            scope = {"all": slice(None), "backbone": slice(len(backbone)), "adapters": slice(len(backbone), None)}
            metrics |= step.add_hinge(total, chosen, rejected, gamma, scope[norm_scope], hinge == "pair")
        return dict(zip(params, total, strict=True)), metrics


@dataclass(frozen=True)
class _Side:
    """The chosen or the rejected half of a batch."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], side: str) -> "_Side":
        return cls(batch[f"{side}_input_ids"], batch[f"{side}_labels"], batch[f"{side}_attention_mask"])

    def row(self, i: int) -> "_Side":
        """One sequence, without the padding that its neighbours need."""
        length = int(self.attention_mask[i].sum())
        part = (slice(i, i + 1), slice(length))
        return _Side(self.input_ids[part], self.labels[part], self.attention_mask[part])

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class _Step:
    """One gradient evaluation: the model, its parameters (theta first) and how ranks add up."""

    model: nn.Module
    params: list[Tensor]
    n_backbone: int
    all_reduce: AllReduce
    sft_reduction: SftReduction

    def base_and_sft(
        self,
        chosen: _Side,
        rejected: _Side,
        batch: Mapping[str, Tensor],
        base: Callable[..., Any],
        lambda_sft: float,
    ) -> tuple[Gradients, Metrics]:
        """Terms (a), (c) and (d); keeps L_SFT's gradient for the lower level in ``self.sft_gradient``."""
        logps_w, tokens_w = self.logps(chosen)
        logps_l, tokens_l = self.logps(rejected)
        self.pairs, self.tokens = self.global_counts(len(chosen), int(tokens_w.sum()))
        leaf_w, leaf_l = logps_w.detach().requires_grad_(), logps_l.detach().requires_grad_()
        reference = (batch["ref_chosen_logps"].to(leaf_w), batch["ref_rejected_logps"].to(leaf_l))
        lengths = {
            "chosen_lengths": tokens_w,
            "rejected_lengths": tokens_l,
            "mean_chosen_length": self.tokens / self.pairs,
        }
        result = bind(base, **lengths)(leaf_w, leaf_l, *reference)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        loss = loss.mean()
        share = len(chosen) / self.pairs
        weight_w, weight_l = torch.autograd.grad(
            loss * share, (leaf_w, leaf_l), allow_unused=True, materialize_grads=True
        )
        weights_w = [weight_w] + ([self.sft_weights(logps_w)] if lambda_sft else [])
        total, *sft = self.pullback(logps_w, weights_w)
        if bool(weight_l.any()):
            _add(total, self.pullback(logps_l, [weight_l])[0])
        self.all_reduce(total)
        if lambda_sft:
            self.sft_gradient = sft[0]
            self.all_reduce(self.sft_gradient)
            _add(total[: self.n_backbone], self.sft_gradient[: self.n_backbone], lambda_sft)
        return total, dict(metrics) | {
            "loss": loss.item(),
            "nll_loss": -(logps_w.sum() / tokens_w.sum()).item(),
            "logps/chosen": logps_w.mean().item(),
            "logps/rejected": logps_l.mean().item(),
        }

    def add_value_term(
        self, total: Gradients, chosen: _Side, lambda_sft: float, steps: int, eta: float, literal: bool
    ) -> Metrics:
        """Term (b), added to phi's part of ``total``."""
        theta, phi = self.params[: self.n_backbone], self.params[self.n_backbone :]
        here = self.sft_gradient[self.n_backbone :]
        # The way from theta to theta_hat is summed up apart: in theta itself small steps drown in rounding.
        direction = [g * -eta for g in self.sft_gradient[: self.n_backbone]]
        with _restored(theta) as origin:
            for _ in range(steps - 1):
                _move(theta, origin, direction)
                _add(direction, self.sft_gradient_of(chosen, theta), -eta)
            length = _norm(direction).item()
            if not length:
                return {"spo/inner_scale": 1.0, "spo/term_b_norm": 0.0, "spo/term_a_norm": 0.0}
            wanted = INNER_STEP[self.compute_dtype] * _norm(origin).item()
            scale = 1.0 if literal else max(1.0, wanted / length)
            _move(theta, origin, direction, scale)
            there = self.sft_gradient_of(chosen, phi)
        term = [(a - b) * (lambda_sft / scale) for a, b in zip(here, there, strict=True)]
        pref = _norm(total[self.n_backbone :])
        _add(total[self.n_backbone :], term)
        size = _norm(term)
        return {"spo/inner_scale": scale, "spo/term_b_norm": size.item(), "spo/term_a_norm": pref.item()}

    def add_hinge(
        self, total: Gradients, chosen: _Side, rejected: _Side, gamma: float, scope: slice, per_pair: bool
    ) -> Metrics:
        """The hinge, ``gamma * grad R``, added to ``total``."""
        with torch.autocast(self.params[0].device.type, enabled=False):  # bfloat16 passes would drown the differences
            return self.hinge_in_full_precision(total, chosen, rejected, gamma, scope, per_pair)

    def hinge_in_full_precision(
        self, total: Gradients, chosen: _Side, rejected: _Side, gamma: float, scope: slice, per_pair: bool
    ) -> Metrics:
        """:meth:`add_hinge` without autocast."""
        if not per_pair:
            grad, excess, norms = self.hinge_gradient(chosen, rejected, scope, self.all_reduce)
            _add(total[: len(grad)], grad, gamma)  # no gradient: the hinge is inactive
            return {"spo/R": excess, "spo/hinge_active": float(bool(grad)), **norms}
        sums = [torch.zeros_like(p) for p in self.params]
        tally = torch.zeros(4, dtype=torch.float64, device=self.params[0].device)
        whole, self.pairs = self.pairs, 1
        for i in range(len(chosen)):
            grad, excess, norms = self.hinge_gradient(chosen.row(i), rejected.row(i), scope, _alone)
            tally += tally.new_tensor([excess, float(bool(grad)), *norms.values()]) / whole
            _add(sums[: len(grad)], grad, 1.0 / whole)
        self.pairs = whole
        self.all_reduce([*sums, tally])
        _add(total, sums, gamma)
        keys = ("spo/R", "spo/hinge_active", "spo/norm_chosen", "spo/norm_rejected")
        return dict(zip(keys, tally.tolist(), strict=True))

    def hinge_gradient(
        self, chosen: _Side, rejected: _Side, scope: slice, all_reduce: AllReduce
    ) -> tuple[Gradients, float, Metrics]:
        """``1[||g_w|| > ||g_l||] * (H_w u_w - H_l u_l)`` (empty if inactive), R, and both norms.

        Hessian-vector products are forward differences of gradients along u = g / ||g|| within the scope.
        """
        sides = (chosen, rejected)
        g_w, g_l = (self.mean_gradient(side, all_reduce) for side in sides)
        norm_w, norm_l = _norm(g_w[scope]).item(), _norm(g_l[scope]).item()
        norms = {"spo/norm_chosen": norm_w, "spo/norm_rejected": norm_l}
        if not norm_w > norm_l:
            return [], 0.0, norms
        moving = self.params[scope]
        length = HESSIAN_STEP[self.params[0].dtype] * _norm(moving).item()
        total = [torch.zeros_like(p) for p in self.params]
        for side, grad, norm, sign in ((chosen, g_w, norm_w, 1.0), (rejected, g_l, norm_l, -1.0)):
            if not norm:
                continue
            with _restored(moving) as origin:
                _move(moving, origin, grad[scope], length / norm)
                moved = self.mean_gradient(side, all_reduce)
            _add(total, moved, sign / length)
            _add(total, grad, -sign / length)
        return total, norm_w - norm_l, norms

    def mean_gradient(self, side: _Side, all_reduce: AllReduce) -> Gradients:
        """Gradient of the batch-mean log-probability for all parameters."""
        logps, _ = self.logps(side)
        (grad,) = self.pullback(logps, [torch.full_like(logps, 1.0 / self.pairs)])
        all_reduce(grad)
        return grad

    def sft_gradient_of(self, chosen: _Side, params: list[Tensor]) -> Gradients:
        """Gradient of L_SFT at the current point, for some of the parameters only."""
        wanted = {id(p) for p in params}
        others = [p for p in self.params if id(p) not in wanted]
        for p in others:
            p.requires_grad_(False)
        try:
            logps, _ = self.logps(chosen)
            (grad,) = self.pullback(logps, [self.sft_weights(logps)], params)
        finally:
            for p in others:
                p.requires_grad_(True)
        self.all_reduce(grad)
        return grad

    def logps(self, side: _Side) -> tuple[Tensor, Tensor]:
        return completion_logps(self.model, side.input_ids, side.labels, side.attention_mask)

    def sft_weights(self, logps: Tensor) -> Tensor:
        """dL_SFT / d log pi(y_w), [B]."""
        return torch.full_like(logps, -1.0 / (self.pairs if self.sft_reduction == "sum" else self.tokens))

    def pullback(self, logps: Tensor, weights: Sequence[Tensor], params: list[Tensor] | None = None) -> list[Gradients]:
        """Gradients of ``sum_i weights_i * logps_i``, one list for each weighting.

        Through ``backward``, not ``autograd.grad``, which sharded parameters do not take. A single row needs a single
        backward: its weightings differ by a factor.
        """
        params = self.params if params is None else params
        if len(logps) == 1:
            (grad,) = [_backward(logps.sum(), params)]
            return [[g * weight.item() for g in grad] for weight in weights]
        last = len(weights) - 1
        return [_backward((logps * w.detach()).sum(), params, keep=i < last) for i, w in enumerate(weights)]

    def global_counts(self, pairs: int, tokens: int) -> tuple[int, int]:
        """Pairs and chosen tokens over all ranks."""
        counts = torch.tensor([pairs, tokens], dtype=torch.float64, device=self.params[0].device)
        self.all_reduce([counts])
        return int(counts[0]), int(counts[1])

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that forward passes compute in: autocast's, or the parameters' own."""
        device = self.params[0].device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.params[0].dtype


def _check(inner_steps: int, norm_scope: str, hinge: str, inner_mode: str, sft_reduction: str) -> None:
    if inner_steps < 0:
        raise ValueError(f"inner_steps must not be negative, got {inner_steps}")
    choices = {
        "norm_scope": (norm_scope, ("all", "backbone", "adapters")),
        "hinge": (hinge, ("batch", "pair")),
        "inner_mode": (inner_mode, ("rescaled", "literal")),
        "sft_reduction": (sft_reduction, ("sum", "token_mean")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@contextmanager
def _scored(model: nn.Module, names: Sequence[str]) -> Generator[dict[str, nn.Parameter]]:
    """Dropout off, and gradients for the named parameters alone; everything is put back at the end."""
    every = dict(model.named_parameters())
    missing = [name for name in names if name not in every]
    if missing:
        raise ValueError(f"the model has no parameter {missing[0]!r} ({len(missing)} names are unknown)")
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in every.values()]
    wanted = {name: every[name] for name in names}
    chosen = {id(p) for p in wanted.values()}
    try:
        model.eval()
        for p in every.values():
            p.requires_grad_(id(p) in chosen)
        with torch.enable_grad(), _KeepFloat64() if _is_float64(wanted.values()) else nullcontext():
            yield wanted
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _restored(params: Sequence[Tensor]) -> Generator[Gradients]:
    """Keep a copy of the parameters and write it back: subtracting a move again would not be exact."""
    saved = [p.detach().clone() for p in params]
    try:
        yield saved
    finally:
        with torch.no_grad():
            for p, value in zip(params, saved, strict=True):
                p.copy_(value)


class _KeepFloat64(TorchFunctionMode):
    """Casts to float32 give float64.

    Hugging Face models compute their norms in float32 whatever their own type is. That rounding of 1e-7 would swamp the
    finite differences, whose float64 steps are far smaller.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _is_float64(params: Iterable[Tensor]) -> bool:
    return all(p.dtype == torch.float64 for p in params)


def _backward(value: Tensor, params: Sequence[Tensor], keep: bool = False) -> Gradients:
    """Gradients of a scalar; ``.grad`` is left as it was."""
    before = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        value.backward(retain_graph=keep)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad


def _move(params: Sequence[Tensor], origin: Sequence[Tensor], direction: Sequence[Tensor], scale: float = 1.0) -> None:
    """``params = origin + scale * direction``."""
    with torch.no_grad():
        for p, start, way in zip(params, origin, direction, strict=True):
            torch.add(start, way, alpha=scale, out=p)


def _add(to: Sequence[Tensor], what: Sequence[Tensor], scale: float = 1.0) -> None:
    if to:
        torch._foreach_add_(list(to), list(what), alpha=scale)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all tensors as one vector."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.detach()) for t in tensors]))


def _alone(tensors: Sequence[Tensor]) -> None:
    """The sum over one rank."""
