"""Theorems 1 and 2 and Corollaries 1 and 2 of arXiv 2507.07723 as functions, for one plain SGD step on one pair.

``learning_rate`` is alpha and ``weight`` is beta * c (see :func:`dpo_weight`); ``lambda_sft`` weighs a further loss
-log pi(y_w|x), as in SPO. All is linear in the step: parameter groups with a rate of their own add up.
"""

import itertools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PairForecast:
    """First-order changes of a pair's log-probabilities (nats) and probabilities in one step."""

    dlogp_chosen: float
    dlogp_rejected: float
    dp_chosen: float
    dp_rejected: float


def dpo_weight(beta, margin):
    """``beta * sigma(-beta * margin)``, the factor of g_w - g_l in DPO's step; ``margin = r_w - r_l`` in nats."""
    shrink = math.exp(-abs(beta * margin))  # cannot overflow
    return beta * (shrink if beta * margin > 0 else 1.0) / (1.0 + shrink)


def gap_term(terms):
    """``||g_w - g_l||^2``, written so that it is never negative."""
    return (terms.norm_chosen - terms.norm_rejected) ** 2 + 2.0 * terms.slack


def sgd_forecast(terms, logp_chosen, logp_rejected, *, learning_rate, weight, lambda_sft=0.0):
    """Theorem 1 (equations 2 and 3), from the log-probabilities before the step."""
    chosen = learning_rate * (weight * terms.chosen_term + lambda_sft * terms.norm_chosen**2)
    rejected = learning_rate * (weight * terms.rejected_term + lambda_sft * terms.dot)
    return PairForecast(chosen, rejected, math.exp(logp_chosen) * chosen, math.exp(logp_rejected) * rejected)


def corollary1_bounds(terms, logp_chosen, logp_rejected, *, learning_rate, weight):
    """Corollary 1 (equations 4 and 5): a lower bound of d pi(y_w), an upper bound of d pi(y_l), from norms alone.

    They are ``alpha * beta * c * pi(y) * ||g_y|| * (||g_w|| - ||g_l||)``.
    """
    excess = terms.norm_chosen - terms.norm_rejected
    sides = ((logp_chosen, terms.norm_chosen), (logp_rejected, terms.norm_rejected))
    lower, upper = (math.exp(logp) * (learning_rate * (weight * (norm * excess))) for logp, norm in sides)
    return lower, upper


def log_gap_change(terms, *, learning_rate, weight, lambda_sft=0.0):
    """``d log pi(y_w) - d log pi(y_l)``: Corollary 2 in its log form.

    Under DPO it is ``alpha * beta * c * ||g_w - g_l||^2 >= 0``. SPO adds ``alpha * lambda * (||g_w||^2 - <g_w, g_l>)``,
    which can be negative.
    """
    return learning_rate * (weight * gap_term(terms) + lambda_sft * terms.chosen_term)


def probability_gap_change(terms, logp_chosen, logp_rejected, *, learning_rate, weight):
    """``d pi(y_w) - d pi(y_l)`` under DPO: the gap of Corollary 2 as printed (equation 6).

    Unlike the log form it can be negative: for ``g_l = a * g_w`` it is ``alpha * beta * c * ||g_w||^2`` times
    ``(1 - a) * (pi(y_w) - a * pi(y_l))``, which is below 0 for a > 1 and pi(y_w) > a * pi(y_l).
    """
    step = sgd_forecast(terms, logp_chosen, logp_rejected, learning_rate=learning_rate, weight=weight)
    return step.dp_chosen - step.dp_rejected


def first_order_mass(logps, jacobian, update):
    """``d pi(y) = pi(y) * <g_y, u>`` of N outputs; over all outputs of a prompt it sums to 0 (Theorem 2).

    ``jacobian`` holds the gradients g_y for each parameter, [N, *shape], and ``update`` what the parameter moves by.
    """
    changes = [g.reshape(len(g), -1) @ step.flatten() for g, step in zip(jacobian, update, strict=True)]
    return logps.exp() * torch.stack(changes).sum(dim=0)


def sequence_logps(model, prompt_ids, vocabulary, length):
    """All sequences of ``length`` tokens and their log-probabilities, float64 [N], in one teacher-forced pass."""
    outputs = list(itertools.product(range(vocabulary), repeat=length))
    ids = torch.tensor([(*prompt_ids, *output) for output in outputs])
    logps = model(input_ids=ids).logits[:, len(prompt_ids) - 1 : -1].double().log_softmax(dim=-1)
    return outputs, logps.gather(2, ids[:, len(prompt_ids) :, None]).sum(dim=(1, 2))
