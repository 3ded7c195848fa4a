"""SPO's lower level: K gradient steps of theta on L_SFT, and term (b) of phi's gradient.

    (b) = lambda * [grad_phi L_SFT(theta, phi) - grad_phi L_SFT(theta_hat, phi)],    theta_hat = theta + d

The difference of the two gradients is the definition (Algorithm 1). How it is computed depends on rounding, and on how
far the lower level moves: on its predicted share, ``-<d, grad L_SFT>`` as a part of L_SFT.

``difference`` computes both gradients. Moving theta by d itself changes L_SFT by less than rounding errors if the share
is small; theta then moves further along d, until L_SFT is predicted to fall by a part of ``SMALLEST_FALL``, and the
difference is scaled back. In half precision theta + d would be rounded, so that linear layers keep d apart
(:func:`spo_ray.core.directional.shifted`) if the share is at least ``SMALLEST_HALF``, and all passes are in float32 if
it is smaller.

``exact`` computes minus lambda times the derivative of grad_phi L_SFT along d, at theta + d/2 or, below a share of
``AT_THETA``, at theta (:mod:`spo_ray.core.directional`). Nothing is subtracted, and nothing is rounded away in half
precision. It differs from the definition by the third derivatives.

``auto`` is ``difference`` in float32 and float64, which costs less there. In half precision it is ``exact`` up to a
share of ``FAR``, above which the difference is more exact and costs less.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spo_ray.core.batch_gradients import BatchGradients
from spo_ray.core.directional import UnsupportedError
from spo_ray.core.gradients import Gradients, add, full_precision, norm
from spo_ray.core.losses import Metrics

InnerMethod = Literal["auto", "exact", "difference"]

SMALLEST_FALL = {torch.float64: 1e-6, torch.float32: 5e-4}
"""Smallest predicted fall of L_SFT over the step of a difference, as a share of L_SFT, by the type of the passes.

Above it the step is theta_hat - theta itself. On a real model with real text, a fall of 0.5% gives the exact term to a
cosine of 0.9999; steps that are a constant part of theta's norm are too long there.
"""
SMALLEST_HALF = 0.04
"""Smallest share from which a difference in half precision is more than noise."""
AT_THETA, FAR = 0.01, 0.1
"""Shares up to which the exact term is taken at theta, and from which ``auto`` takes a difference in half precision."""
USED = ("difference", "exact at theta", "exact at the midpoint", "difference in float32")
"""Meaning of the values 0 to 3 of the metric ``spo/inner_method``."""


@dataclass(frozen=True)
class LowerLevel:
    """The lower level of a step over a batch."""

    passes: BatchGradients
    n_backbone: int
    """Number of theta's parameters, which come first."""
    weights: Tensor | None
    """Weights [B] of log pi(y_w) that give L_SFT; None if lambda is 0."""
    lambda_sft: float
    steps: int
    """K; 0 drops term (b)."""
    eta: float
    method: InnerMethod
    weight: float
    """Factor of term (b)."""

    def add_term_b(self, total: Gradients, sft: Gradients, loss: float) -> Metrics:
        """Add term (b) to phi's part of ``total``; return metrics.

        Args:
            total: gradient of the objective without term (b).
            sft: gradient of L_SFT for all parameters; theta's part is overwritten.
            loss: L_SFT.
        """
        theta, here = self.passes.params[: self.n_backbone], sft[self.n_backbone :]
        direction, predicted = self._descend(theta, sft[: self.n_backbone])
        size = norm(total[self.n_backbone :])
        term, metrics = self._term(theta, direction, here, predicted, loss) if predicted else ([], {})
        if term:
            add(total[self.n_backbone :], term, self.weight)
        gap = metrics.pop("gap", predicted)
        length = norm(term) * self.weight
        return metrics | {
            "spo/inner_gap": gap,
            "spo/inner_gap_share": gap / loss if loss else 0.0,
            "spo/term_b_norm": length,
            "spo/term_b_over_a": length / size if size else 0.0,
        }

    def _descend(self, theta: list[Tensor], grad: Gradients) -> tuple[Gradients, float]:
        """Take K steps from theta; return theta_hat - theta, and the predicted fall of L_SFT. Overwrites ``grad``."""
        assert self.weights is not None
        predicted = self.eta * norm(grad) ** 2
        direction = [g.mul_(-self.eta) for g in grad]
        for _ in range(self.steps - 1):
            # Summed up apart from theta, because theta + a small step would be rounded.
            with self.passes.displaced(theta, [d.clone() for d in direction]):
                ahead = self.passes.gradient(self.passes.chosen, self.weights, theta)[1]
            predicted += self.eta * norm(ahead) ** 2
            add(direction, ahead, -self.eta)
        return direction, predicted

    def _term(
        self, theta: list[Tensor], direction: Gradients, here: Gradients, predicted: float, loss: float
    ) -> tuple[Gradients, Metrics]:
        share, half = predicted / loss if loss else 0.0, self.passes.half_precision
        if self.method == "exact" or (self.method == "auto" and half and share < FAR):
            try:
                return self._exact(theta, direction, predicted, share)
            except UnsupportedError as error:
                if self.method == "exact":
                    raise ValueError(f"inner_method='exact' is impossible for this model: {error}") from error
        return self._difference(theta, direction, here, share, loss)

    def _exact(
        self, theta: list[Tensor], direction: Gradients, predicted: float, share: float
    ) -> tuple[Gradients, Metrics]:
        """Return term (b) by the derivative along the direction."""
        assert self.weights is not None
        passes, phi = self.passes, self.passes.params[self.n_backbone :]
        midpoint = share >= AT_THETA
        slope, grad = passes.directional(
            passes.chosen, self.weights, theta, direction, phi, shift=0.5 if midpoint else 0.0
        )
        torch._foreach_mul_(grad, -self.lambda_sft)
        # At theta two ways to compute the slope must agree; at the midpoint it also differs by the curvature.
        bent = abs(1 + slope / predicted)
        error = bent**2 + torch.finfo(passes.compute_dtype).eps if midpoint else bent
        return grad, {"gap": -slope, "spo/inner_method": 1.0 + midpoint, "spo/term_b_error": error}

    def _difference(
        self, theta: list[Tensor], direction: Gradients, here: Gradients, share: float, loss: float
    ) -> tuple[Gradients, Metrics]:
        """Return term (b) by a difference of two gradients."""
        assert self.weights is not None
        passes, phi = self.passes, self.passes.params[self.n_backbone :]
        precise = passes.half_precision and share < SMALLEST_HALF
        with full_precision(passes.model) if precise else nullcontext():
            dtype = torch.float32 if precise else passes.compute_dtype
            scale = max(1.0, SMALLEST_FALL[dtype] / share) if dtype in SMALLEST_FALL else 1.0
            if precise:
                loss, here = passes.gradient(passes.chosen, self.weights, phi)
            with passes.displaced(theta, direction, scale):
                there_loss, there = passes.gradient(passes.chosen, self.weights, phi)
        term = [(a - b) * (self.lambda_sft / scale) for a, b in zip(here, there, strict=True)]
        noise, size = self.lambda_sft / scale * torch.finfo(dtype).eps * norm(here), norm(term)
        error = (noise / size if size else 0.0) + (SMALLEST_FALL[dtype] if scale > 1 else 0.0)
        metrics = {"gap": (loss - there_loss) / scale, "spo/inner_method": 3.0 if precise else 0.0}
        return term, metrics | {"spo/term_b_error": error}
