"""Learning dynamics: how a gradient step moves log-probabilities (Theorem 1 and Corollary 1 of arXiv 2507.07723).

With ``g_y = grad log pi(y|x)``, a parameter step u changes log pi(y|x) by ``<g_y, u>`` to first order. Plain SGD on DPO
with one pair makes the step ``u = alpha * beta * c * (g_w - g_l)``, with ``c = sigma(-beta * margin)``. Logps are
in nats, summed over the completion. tests/core/theory.py states the theorems and checks them on real steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_ray.core.running_statistics import AllReduce, single_rank
from spo_ray.core.sharded import local, total

CHUNK = 1 << 22
"""Elements held in float64 at a time: an embedding matrix as a whole would take gigabytes."""


@dataclass(frozen=True)
class GradientTerms:
    """Norms and inner product of g_w and g_l, from which all terms of the theorems follow."""

    norm_chosen: float
    norm_rejected: float
    dot: float

    @classmethod
    def of(
        cls, chosen_grads: Sequence[Tensor], rejected_grads: Sequence[Tensor], all_reduce: AllReduce = single_rank
    ) -> "GradientTerms":
        """Compute the terms of two gradients, lists of tensors in one order, in float64.

        ``all_reduce`` sums tensors in place over ranks, if each rank holds a part of the gradients. The terms of nearly
        parallel gradients are small differences of large numbers, so rounding errors of the gradients dominate them.

        Raises:
            ValueError: the lists are empty or differ in length or shapes.
        """
        pairs = ((chosen_grads, chosen_grads), (rejected_grads, rejected_grads), (chosen_grads, rejected_grads))
        products = torch.stack([_inner_product(*pair) for pair in pairs])
        all_reduce([products])
        chosen, rejected, dot = products.tolist()
        return cls(math.sqrt(chosen), math.sqrt(rejected), dot)

    # Written with the slack, the corollaries hold to the last bit. max() and min() return NaN only if it comes first.

    @property
    def slack(self) -> float:
        """``||g_w|| ||g_l|| - <g_w, g_l>``, at least 0 by the Cauchy-Schwarz inequality."""
        return max(self.norm_chosen * self.norm_rejected - self.dot, 0.0)

    @property
    def chosen_term(self) -> float:
        """``||g_w||^2 - <g_w, g_l>``, with the sign of d pi(y_w) under DPO (equation 2)."""
        return self.norm_chosen * (self.norm_chosen - self.norm_rejected) + self.slack

    @property
    def rejected_term(self) -> float:
        """``<g_w, g_l> - ||g_l||^2``, with the sign of d pi(y_l) under DPO (equation 3)."""
        return self.norm_rejected * (self.norm_chosen - self.norm_rejected) - self.slack

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the gradients; 0 if one of them is 0."""
        if not self.norm_chosen or not self.norm_rejected:
            return 0.0
        return max(min(self.dot / self.norm_chosen / self.norm_rejected, 1.0), -1.0)

    @property
    def excess(self) -> float:
        """``R = max(0, ||g_w|| - ||g_l||)`` (equation 77); where it is 0, pi(y_l) does not rise under DPO."""
        return max(self.norm_chosen - self.norm_rejected, 0.0)

    def metrics(self) -> dict[str, float]:
        """Return the terms under their names in the training log, ``dynamics/*``."""
        names = ("chosen_term", "rejected_term", "cosine", "norm_chosen", "norm_rejected")
        return {f"dynamics/{name}": getattr(self, name) for name in names} | {"dynamics/R": self.excess}


def forecast(gradient: Sequence[Tensor], update: Sequence[Tensor]) -> float:
    """Return ``<g_y, u>``, the first-order change (nats) of log pi(y|x) under any optimizer's ``update``.

    Raises:
        ValueError: the lists are empty or differ in length or shapes.
    """
    return _inner_product(gradient, update).item()


def _inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return ``<left, right>`` of two lists of tensors in float64, over all ranks where they are shards."""
    if len(left) != len(right) or not left or any(a.shape != b.shape for a, b in zip(left, right, strict=False)):
        raise ValueError("two lists of tensors of the same shapes are needed, with one tensor at least")
    parts = [
        torch.dot(x.double(), y.double())
        for a, b in zip(left, right, strict=True)
        for x, y in zip(local(a).flatten().split(CHUNK), local(b).flatten().split(CHUNK), strict=True)
    ]
    return total(torch.stack([part.to(parts[0].device) for part in parts]).sum(), left)
