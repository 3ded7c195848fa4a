"""The SPO step: Algorithm 1 of arXiv 2507.07723, terms (a) to (e).

One call gives the gradient of the bilevel objective ``F = L_pref + lambda * (L_SFT - L_SFT*(phi)) + gamma * R``
(equation 9) for the backbone theta and the adapters phi:

    phi:    (a) grad L_pref  + (b) lambda * [grad L_SFT(theta, phi) - grad L_SFT(theta_hat, phi)]  + gamma * grad R
    theta:  (c) grad L_pref  + (d) lambda * grad L_SFT(theta, phi)                                 + (e) gamma * grad R

``theta_hat`` is theta after K steps of size eta on L_SFT (equation 11), and ``R = max(0, ||g_w|| - ||g_l||)``
(equation 77) with ``g = grad log pi(y|x)``. With lambda = gamma = K = 0 a step is the base loss alone, so every
preference method is trained by this function.

Cost in units of a forward of one sequence, with a backward as two: a pair's base loss takes 6. The backward of y_w also
gives (d), the move to theta_hat for K = 1 and the norms in R. (b) takes 2 more (no gradients of theta), every further
inner step 3, and the gradient of R 6, only if the hinge is active. With K = gamma = 0, (d) is free however many pairs
share a backward (:mod:`spo_ray.core.joint_pass`). Gradients are means over the pairs of the batch, summed over
data-parallel ranks by ``all_reduce``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spo_ray.core.batch_gradients import BatchGradients, Side, Sums, Tally
from spo_ray.core.dynamics import GradientTerms
from spo_ray.core.gradients import Gradients, add, deterministic, full_precision, norm, perturbed
from spo_ray.core.joint_pass import JointPass, lora_linears
from spo_ray.core.losses import Metrics, SftReduction, bind
from spo_ray.core.running_statistics import AllReduce, single_rank

INNER_STEP = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-4, torch.float16: 5e-5}
CENTRAL_INNER_STEP = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-4, torch.float16: 1e-4}
"""Relative step ||d|| / ||theta|| of term (b)'s rescaled difference; eta itself moves theta by less than rounding."""
HESSIAN_STEP = {torch.float64: 1e-9, torch.float32: 3e-6}
CENTRAL_HESSIAN_STEP = {torch.float64: 1e-7, torch.float32: 3e-5}
"""Relative step of the finite-difference Hessian-vector products in grad R, which need at least float32.

Their error on test models, forward and central: 6e-7 and 2e-9 in float64; 0.7% and 0.04% in float32.
"""


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
    full_precision_inner: bool = True,
    norm_of: Literal["sum", "mean"] = "sum",
    difference: Literal["forward", "central"] = "forward",
    pairs_per_backward: int | None = None,
    chunk_tokens: int | None = None,
    share_prompt: bool | None = None,
    side_gradients: dict[str, Gradients] | None = None,
    all_reduce: AllReduce = single_rank,
) -> tuple[dict[str, Tensor], Metrics]:
    """Compute the gradient of SPO's objective on one batch of pairs; docs/mathematics.md discusses the options.

    Args:
        model: a Hugging Face causal language model, with or without PEFT adapters.
        batch: ``{chosen,rejected}_{input_ids,labels,attention_mask}`` [B, T] and ``ref_{chosen,rejected}_logps`` [B].
            ``valid`` [B] is optional: False for padding rows, which give all ranks as many rows and count for nothing.
        backbone, adapters: names of theta's and phi's parameters.
        base: L_pref, a name in :data:`spo_ray.core.losses.LOSSES` or a callable of
            :class:`spo_ray.core.losses.PairLogps` that returns the mean loss, losses [B] or ``(loss, metrics)``; fix
            further parameters with ``functools.partial``.
        beta, margin: inverse temperature and margin of a base loss given by name; a callable ignores them.
        lambda_sft, gamma: weights of the value-function penalty and of R.
        inner_steps, eta: K and the step size of the lower level; K = 0 drops (b).
        sft_reduction: L_SFT as the mean of sequence sums (equation 72), or per completion token of the batch.
        norm_scope, norm_of: the parameters whose gradient norms make R, of summed or of mean log-probabilities.
        hinge: R on the gradient of the batch-mean log-probability, or the mean of every pair's own R.
        inner_mode: (b) over a longer step along theta_hat - theta, scaled back (equal to first order, and larger than
            rounding errors), or literally at theta_hat.
        full_precision_inner: compute the rescaled (b) in float32: under autocast 4 slow units instead of 2. Without it
            the direction is inexact there (cosine 0.75 to 0.94 with the exact one).
        difference: forward or central differences, in grad R (6 or 12 units) and in the rescaled (b) (2 or 4).
        pairs_per_backward: with 1, (d) and the norms cost nothing; more use the hardware better if sequences are short.
            None: by the tokens of the batch. Required with sharded parameters (:mod:`spo_ray.core.sharded`), which also
            need equal numbers of rows on all ranks.
        chunk_tokens: see :func:`spo_ray.core.logps.token_logps`.
        share_prompt: compute a pair's prompt once for both sides (:mod:`spo_ray.core.shared_prompt`), if there is only
            the base loss, without L_SFT, R and ``side_gradients``. None: on a CPU, where it was measured faster.
        side_gradients: a dict that receives the gradients of the batch-mean log-probabilities, ``chosen`` and
            ``rejected``; the metrics then include Theorem 1's terms, ``dynamics/*``.
        all_reduce: sums tensors in place over the ranks of a data-parallel group.

    Returns:
        ``(grads, metrics)``: the gradient of F for every listed parameter by name, and metrics; ``logps/*`` and
        ``rewards/*`` are means over this rank's pairs, ``spo/*`` and ``dynamics/*`` are of the whole batch.

    Raises:
        ValueError: an unknown base, option or parameter name, a negative ``inner_steps``, an empty completion, or
            ``hinge="pair"`` with sharded parameters, for which no pair's own gradient exists.
    """
    _check(inner_steps, pairs_per_backward, (norm_scope, hinge, inner_mode, sft_reduction, norm_of, difference))
    n, central = len(backbone), difference == "central"
    scope = {"all": slice(None), "backbone": slice(n), "adapters": slice(n, None)}[norm_scope]
    with deterministic(model, [*backbone, *adapters]) as named:
        passes = BatchGradients(
            model, list(named.values()), batch, all_reduce, pairs_per_backward, chunk_tokens, share_prompt
        )
        sft = passes.sft_weights(sft_reduction) if lambda_sft else None
        steps, literal = inner_steps if adapters else 0, inner_mode == "literal"
        lower = _LowerLevel(passes, n, sft, lambda_sft, steps, eta, literal, central, full_precision_inner)
        regularizer = _Hinge(passes, gamma, hinge, scope, norm_of == "mean", central)
        base_loss = bind(base, beta=beta, margin=margin)
        total, metrics = _objective(passes, base_loss, lower, regularizer, side_gradients)
        return dict(zip(named, total, strict=True)), metrics


def _objective(
    passes: BatchGradients,
    base: Callable[..., Any],
    lower: "_LowerLevel",
    regularizer: "_Hinge",
    side_gradients: dict[str, Gradients] | None,
) -> tuple[Gradients, Metrics]:
    """Return the gradient of F.

    The passes over the pairs give terms (a) and (c) and the sums that the other terms need; then R's gradient with (e),
    (d) and (b) are added.
    """
    whole, n = regularizer.gamma > 0 and regularizer.hinge == "batch", lower.n_backbone
    plain = passes.mean_weights()
    norms = regularizer.weights() if whole else plain if side_gradients is not None else None
    per_token = whole and regularizer.mean
    visit = regularizer.of_pair if regularizer.gamma > 0 and not whole else None
    if visit and passes.sharded:
        raise ValueError("sharded backward passes give no pair's own gradient: use hinge='batch', or whole parameters")
    joint = None
    if norms is None and visit is None and (lower.weights is None or not lower.steps):
        adapters = [] if lower.weights is None else lora_linears(passes.model, passes.params[n:])
        joint = JointPass(lower.lambda_sft, n, adapters)
    sums = passes.accumulate(base, lower.weights, norms, visit, proportional=not per_token, joint=joint)
    total, metrics = sums.total, passes.means(sums.tally)
    if whole:
        metrics |= regularizer.add_to(total, sums)
    if side_gradients is not None:
        sides = (passes.chosen, passes.rejected)
        own = (sums.chosen, sums.rejected)
        chosen, rejected = (passes.gradient(s, w) for s, w in zip(sides, plain, strict=True)) if per_token else own
        side_gradients |= {"chosen": chosen, "rejected": rejected}
        metrics |= GradientTerms.of(chosen, rejected).metrics()
    if lower.weights is not None and not joint:
        add(total[:n], sums.sft[:n], lower.lambda_sft)
        if lower.steps:
            metrics |= lower.add_term_b(total, sums.sft)
    return total, metrics


@dataclass(frozen=True)
class _LowerLevel:
    """Lower level: K gradient steps of theta on L_SFT, for term (b)."""

    passes: BatchGradients
    n_backbone: int
    weights: Tensor | None
    """Weights [B] of log pi(y_w) that give L_SFT; None if lambda is 0."""
    lambda_sft: float
    steps: int
    eta: float
    literal: bool
    central: bool
    precise: bool

    def add_term_b(self, total: Gradients, sft: Gradients) -> Metrics:
        """Add term (b) to phi's part of ``total``; theta's part of ``sft``, the gradient of L_SFT, is overwritten."""
        assert self.weights is not None
        theta, phi = self.passes.params[: self.n_backbone], self.passes.params[self.n_backbone :]
        here, gap = sft[self.n_backbone :], self.eta * norm(sft[: self.n_backbone]) ** 2
        direction = [g.mul_(-self.eta) for g in sft[: self.n_backbone]]
        for _ in range(self.steps - 1):
            with perturbed(theta, [d.clone() for d in direction]):
                grad = self.passes.gradient(self.passes.chosen, self.weights, theta)
            gap += self.eta * norm(grad) ** 2
            # Summed up apart from theta, because theta + a small step would be rounded.
            add(direction, grad, -self.eta)
        metrics = {"spo/inner_gap": gap, "spo/term_a_norm": norm(total[self.n_backbone :])}
        length = norm(direction)
        if not length:
            return metrics | {"spo/inner_scale": 1.0, "spo/term_b_norm": 0.0, "spo/term_b_snr": 0.0}
        central, chosen = self.central and not self.literal, self.passes.chosen
        leave = full_precision(self.passes.model) if self.precise and not self.literal else nullcontext(False)
        with leave as changed:
            dtype = _compute_dtype(self.passes)
            wanted = (CENTRAL_INNER_STEP if central else INNER_STEP)[dtype] * norm(theta)
            scale = 1.0 if self.literal else max(1.0, wanted / length)
            if central:
                with perturbed(theta, [d.clone() for d in direction], -scale):
                    here = self.passes.gradient(chosen, self.weights, phi)
            elif changed:
                here = self.passes.gradient(chosen, self.weights, phi)
            with perturbed(theta, direction, scale):
                there = self.passes.gradient(chosen, self.weights, phi)
        width = 2 * scale if central else scale
        term = [(a - b) * (self.lambda_sft / width) for a, b in zip(here, there, strict=True)]
        add(total[self.n_backbone :], term)
        noise = self.lambda_sft / width * torch.finfo(dtype).eps * norm(here)
        return metrics | {
            "spo/inner_scale": scale,
            "spo/term_b_norm": norm(term),
            "spo/term_b_snr": norm(term) / noise if noise else 0.0,
        }


@dataclass(frozen=True)
class _Hinge:
    """R by finite differences: grad R is ``1[||g_w|| > ||g_l||] * (H_w u_w - H_l u_l)``, ``u = g / ||g||``."""

    passes: BatchGradients
    gamma: float
    hinge: str
    scope: slice
    mean: bool
    central: bool

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return weights [B] of both sides for the batch mean of log-probabilities, or of their means per token."""
        sides = (self.passes.chosen, self.passes.rejected)
        chosen, rejected = (self.of_tokens(side.lengths) / self.passes.pairs for side in sides)
        return chosen, rejected

    def of_tokens(self, lengths: Tensor) -> Tensor:
        """Return weights [B] of the sequences' log-probabilities in their norms."""
        return 1.0 / lengths.double() if self.mean else torch.ones_like(lengths, dtype=torch.float64)

    def add_to(self, total: Gradients, sums: Sums) -> Metrics:
        """Add the gradient of R on batch means to ``total``."""
        passes, weights = self.passes, self.weights()
        sides = (passes.chosen, passes.rejected)
        with full_precision(passes.model) as changed:
            grads = (sums.chosen, sums.rejected)
            if changed:
                chosen, rejected = (passes.gradient(s, w) for s, w in zip(sides, weights, strict=True))
                grads = chosen, rejected
            grad, metrics = self.gradient(sides, weights, grads, passes.gradient)
        if grad:
            add(total, grad, self.gamma)
        return metrics

    def of_pair(self, sides: tuple[Side, Side], grads: tuple[Gradients, Gradients], tally: Tally) -> Gradients:
        """Return a pair's share of the gradient of the mean of R, from the gradients of its two log-probabilities."""
        passes, weights = self.passes, tuple(self.of_tokens(side.lengths) for side in sides)
        with full_precision(passes.model) as changed:
            for side, weight, grad in zip(sides, weights, grads, strict=True):
                if changed:
                    grad[:] = passes.local_gradient(side, weight)
                else:
                    torch._foreach_mul_(grad, weight.item())
            grad, metrics = self.gradient(sides, weights, grads, passes.local_gradient)
        tally.add(metrics, 1)
        return [g.mul_(self.gamma / passes.pairs) for g in grad]

    def gradient(
        self,
        sides: tuple[Side, Side],
        weights: tuple[Tensor, ...],
        grads: tuple[Gradients, ...],
        compute: Callable[[Side, Tensor], Gradients],
    ) -> tuple[Gradients, Metrics]:
        """Return the gradient of R from the gradients of both sides; empty if the hinge is inactive."""
        norms = [norm(grad[self.scope]) for grad in grads]
        excess = max(0.0, norms[0] - norms[1])
        metrics = {"spo/R": excess, "spo/hinge_active": float(excess > 0)}
        metrics |= {"spo/norm_chosen": norms[0], "spo/norm_rejected": norms[1]}
        if not excess:
            return [], metrics
        moving = self.passes.params[self.scope]
        steps = CENTRAL_HESSIAN_STEP if self.central else HESSIAN_STEP
        length = steps[moving[0].dtype] * norm(moving)
        total = [torch.zeros_like(p) for p in self.passes.params]
        for side, weight, grad, size, sign in zip(sides, weights, grads, norms, (1.0, -1.0), strict=True):
            if not size:
                continue
            direction = grad[self.scope]
            with perturbed(moving, [d.clone() for d in direction], length / size):
                ahead = compute(side, weight)
            behind, width = grad, length
            if self.central:
                width = 2 * length
                with perturbed(moving, [d.clone() for d in direction], -length / size):
                    behind = compute(side, weight)
            add(total, ahead, sign / width)
            add(total, behind, -sign / width)
        return total, metrics


def _compute_dtype(passes: BatchGradients) -> torch.dtype:
    """Return the type of forward passes: autocast's, or the parameters' own."""
    device, own = passes.device.type, getattr(passes.model, "compute_dtype", None)
    if own is not None:
        return own
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else passes.params[0].dtype


CHOICES = {
    "norm_scope": ("all", "backbone", "adapters"),
    "hinge": ("batch", "pair"),
    "inner_mode": ("rescaled", "literal"),
    "sft_reduction": ("sum", "token_mean"),
    "norm_of": ("sum", "mean"),
    "difference": ("forward", "central"),
}


def _check(inner_steps: int, pairs_per_backward: int | None, chosen: Sequence[str]) -> None:
    if inner_steps < 0:
        raise ValueError(f"inner_steps must not be negative, got {inner_steps}")
    if pairs_per_backward is not None and pairs_per_backward < 1:
        raise ValueError(f"pairs_per_backward must be at least 1, got {pairs_per_backward}")
    for (name, known), value in zip(CHOICES.items(), chosen, strict=True):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
