"""SPO's regularizer ``R = max(0, ||g_w|| - ||g_l||)`` on gradient norms (equation 77), and its gradient.

``grad R = 1[||g_w|| > ||g_l||] * (H_w u_w - H_l u_l)`` with ``u = g / ||g||`` and the Hessians H of the
log-probabilities. In float32 and float64 the products are forward differences of gradients, which reuse g_w and g_l. In
half precision, whose rounding is larger than such differences, they are exact (:mod:`spo_ray.core.directional`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spo_ray.core.batch_gradients import BatchGradients, Sums
from spo_ray.core.directional import UnsupportedError
from spo_ray.core.gradients import Gradients, add, full_precision, norm, perturbed
from spo_ray.core.losses import Metrics
from spo_ray.core.sides import Side, Tally

HESSIAN_STEP = {torch.float64: 1e-9, torch.float32: 3e-6}
"""Step of the differences, relative to the norm of the parameters. Their error on test models: 6e-7 and 0.7%."""


@dataclass(frozen=True)
class Hinge:
    """R of a batch, or of every pair."""

    passes: BatchGradients
    gamma: float
    kind: Literal["batch", "pair"]
    scope: slice
    """The parameters whose gradients' norms make R."""
    mean: bool
    """Norms of mean log-probabilities per token, in place of sums."""
    exact: bool
    """Use exact products also in float32 and float64."""

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
        passes = self.passes
        grad, metrics = self._gradient(
            (passes.chosen, passes.rejected), self.weights(), (sums.chosen, sums.rejected), own=False
        )
        if grad:
            add(total, grad, self.gamma)
        return metrics

    def of_pair(self, sides: tuple[Side, Side], grads: tuple[Gradients, Gradients], tally: Tally) -> Gradients:
        """Return a pair's share of the gradient of the mean of R, from the gradients of its two log-probabilities."""
        weights = tuple(self.of_tokens(side.lengths) for side in sides)
        for grad, weight in zip(grads, weights, strict=True):
            torch._foreach_mul_(grad, weight.item())
        grad, metrics = self._gradient(sides, weights, grads, own=True)
        tally.add(metrics, 1)
        return [g.mul_(self.gamma / self.passes.pairs) for g in grad]

    def _gradient(
        self,
        sides: tuple[Side, Side],
        weights: tuple[Tensor, ...],
        grads: tuple[Gradients, ...],
        *,
        own: bool,
    ) -> tuple[Gradients, Metrics]:
        """Return the gradient of R from the gradients of both sides; empty if the hinge is inactive."""
        norms = [norm(grad[self.scope]) for grad in grads]
        excess = max(0.0, norms[0] - norms[1])
        metrics = {"spo/R": excess, "spo/hinge_active": float(excess > 0)}
        metrics |= {"spo/norm_chosen": norms[0], "spo/norm_rejected": norms[1]}
        if not excess:
            return [], metrics
        total = [torch.zeros_like(p) for p in self.passes.params]
        for side, weight, grad, size, sign in zip(sides, weights, grads, norms, (1.0, -1.0), strict=True):
            if size:
                add(total, self._product(side, weight, grad, own=own), sign)
        return total, metrics

    def _product(self, side: Side, weight: Tensor, grad: Gradients, *, own: bool) -> Gradients:
        """Return H u for the side with gradient g = ``grad``."""
        passes, moving = self.passes, self.passes.params[self.scope]
        if self.exact or passes.half_precision:
            try:
                _, product = passes.directional(side, weight, moving, grad[self.scope], passes.params, own=own)
            except UnsupportedError as error:
                if self.exact:
                    raise ValueError(f"inner_method='exact' is impossible for this model: {error}") from error
            else:
                torch._foreach_mul_(product, 1 / norm(grad[self.scope]))
                return product
        with full_precision(passes.model) as changed:
            behind = passes.gradient(side, weight, own=own)[1] if changed else grad
            length = HESSIAN_STEP[moving[0].dtype] * norm(moving)
            direction = [g.clone() for g in behind[self.scope]]
            with perturbed(moving, direction, length / norm(direction)):
                ahead = passes.gradient(side, weight, own=own)[1]
        add(ahead, behind, -1.0)
        torch._foreach_mul_(ahead, 1 / length)
        return ahead
