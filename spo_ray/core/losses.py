"""Preference losses as free functions of sequence log-probabilities.

Every loss takes four tensors [B] first, in nats, summed over the completion: the policy's log-probability of the chosen
and of the rejected response, then the reference model's; parameters follow by keyword, lengths (tokens, [B]) among
them where the loss needs them. It returns ``(loss, metrics)``: the mean over pairs, and floats under TRL's names.
In the equations u = log pi(y|x), r = u - log pi_ref(y|x), n = length in tokens, _w chosen, _l rejected.
Rewards are beta * r, or what takes its place in the loss.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_ray.core.running_statistics import AllReduce, RunningStatistics, single_rank

Metrics = dict[str, float]
Loss = Callable[..., tuple[Tensor, Metrics]]
SftReduction = Literal["sum", "token_mean"]


def dpo(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor, *, beta: float
) -> tuple[Tensor, Metrics]:
    """``-log sigma(beta * (r_w - r_l))``: equation (1); Rafailov et al., arXiv 2305.18290, equation 7."""
    rewards_w = beta * (chosen_logps - ref_chosen_logps)
    rewards_l = beta * (rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(rewards_w - rewards_l).mean(), reward_metrics(rewards_w, rewards_l)


def cdpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.1,
) -> tuple[Tensor, Metrics]:
    """``(1 - e) l(z) + e l(-z)`` with ``l = -log sigma``, ``z = beta (r_w - r_l)``: conservative DPO.

    For labels that are wrong with probability e; Mitchell, "A note on DPO with noisy preferences", 2023.
    """
    rewards_w = beta * (chosen_logps - ref_chosen_logps)
    rewards_l = beta * (rejected_logps - ref_rejected_logps)
    z = rewards_w - rewards_l
    losses = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return losses.mean(), reward_metrics(rewards_w, rewards_l)


def robust_dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.1,
) -> tuple[Tensor, Metrics]:
    """``((1 - e) l(z) - e l(-z)) / (1 - 2e)``: DPO's loss without bias under labels flipped with probability e < 1/2.

    Chowdhury et al., arXiv 2403.00409.
    """
    rewards_w = beta * (chosen_logps - ref_chosen_logps)
    rewards_l = beta * (rejected_logps - ref_rejected_logps)
    z = rewards_w - rewards_l
    losses = label_smoothing * F.logsigmoid(-z) - (1 - label_smoothing) * F.logsigmoid(z)
    return losses.mean() / (1 - 2 * label_smoothing), reward_metrics(rewards_w, rewards_l)


def ipo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    ipo_reduction: Literal["mean", "sum"] = "mean",
) -> tuple[Tensor, Metrics]:
    """``(h - 1 / (2 beta))^2``, ``h = r_w / n_w - r_l / n_l`` (``mean``, as in TRL) or ``r_w - r_l`` (``sum``).

    Azar et al., arXiv 2310.12036, equation 17; beta is its tau.
    """
    gain_w, gain_l = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    scaled = ipo_reduction == "mean"
    h = gain_w / chosen_lengths - gain_l / rejected_lengths if scaled else gain_w - gain_l
    return ((h - 1 / (2 * beta)) ** 2).mean(), reward_metrics(beta * gain_w, beta * gain_l)


def simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    margin: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> tuple[Tensor, Metrics]:
    """``-log sigma(beta * (u_w / n_w - u_l / n_l) - margin)``; Meng et al., arXiv 2405.14734.

    Reference-free. The margin is absolute: the paper's gamma, not its ratio gamma / beta.
    """
    rewards_w, rewards_l = beta * chosen_logps / chosen_lengths, beta * rejected_logps / rejected_lengths
    return -F.logsigmoid(rewards_w - rewards_l - margin).mean(), reward_metrics(rewards_w, rewards_l)


def alpha_dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    margin: float,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    alpha: float = 0.5,
    statistics: RunningStatistics | None = None,
    all_reduce: AllReduce = single_rank,
) -> tuple[Tensor, Metrics]:
    """``-log sigma(z0 - stopgrad(margin + alpha * zscore(g)))``: a margin that adapts to every pair.

    ``z0 = beta * (u_w / n_w - u_l / n_l)`` and g the same without beta, less the reference's; Wu et al., arXiv
    2410.10148. The public trainer has alpha inside beta: alpha here is beta * alpha there. The z-score is over
    ``statistics``, which take in every step's g before they are used (None: over this batch alone).
    """
    rewards_w, rewards_l = beta * chosen_logps / chosen_lengths, beta * rejected_logps / rejected_lengths
    with torch.no_grad():
        gain_w, gain_l = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
        gap = gain_w / chosen_lengths - gain_l / rejected_lengths
        statistics = RunningStatistics() if statistics is None else statistics
        statistics.update(gap, all_reduce)
        target = margin + alpha * statistics.zscore(gap)
    metrics = reward_metrics(rewards_w, rewards_l) | {"alpha_dpo/margin": target.mean().item()}
    return -F.logsigmoid(rewards_w - rewards_l - target).mean(), metrics


def dpop(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    penalty: float = 50.0,
) -> tuple[Tensor, Metrics]:
    """``-log sigma(beta * (r_w - r_l - penalty * max(0, -r_w)))``: DPO-Positive; Pal et al., arXiv 2402.13228."""
    gain_w, gain_l = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    losses = -F.logsigmoid(beta * (gain_w - gain_l - penalty * torch.relu(-gain_w)))
    return losses.mean(), reward_metrics(beta * gain_w, beta * gain_l)


def nll(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    mean_chosen_length: float,
    sft_reduction: SftReduction = "sum",
) -> tuple[Tensor, Metrics]:
    """``L_SFT`` on the chosen responses alone: mean of -log pi(y_w|x) (equation 72), or per token."""
    return sft_loss(chosen_logps, mean_chosen_length, sft_reduction), {}


def dpo_nll(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    mean_chosen_length: float,
    mu: float = 1.0,
    sft_reduction: SftReduction = "sum",
) -> tuple[Tensor, Metrics]:
    """``L_DPO + mu * L_SFT`` on all parameters; Pang et al., arXiv 2404.19733, which takes L_SFT per token."""
    loss, metrics = dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta)
    return loss + mu * sft_loss(chosen_logps, mean_chosen_length, sft_reduction), metrics


def sft_loss(logps: Tensor, mean_length: float, reduction: SftReduction) -> Tensor:
    """``L_SFT`` of completions: minus the mean of the summed log-probabilities (``sum``), or that per token.

    ``token_mean`` is the total over the total number of tokens, for which the mean length of the whole batch is needed:
    one rank of several knows its own completions only.
    """
    return -logps.mean() if reduction == "sum" else -logps.mean() / mean_length


def reward_metrics(rewards_chosen: Tensor, rewards_rejected: Tensor) -> Metrics:
    """TRL's ``rewards/*`` metrics, means over pairs."""
    with torch.no_grad():
        margins = rewards_chosen - rewards_rejected
        return {
            "rewards/chosen": rewards_chosen.mean().item(),
            "rewards/rejected": rewards_rejected.mean().item(),
            "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).double().mean().item(),
        }


LOSSES: dict[str, Loss] = {
    loss.__name__: loss for loss in (dpo, cdpo, robust_dpo, ipo, simpo, alpha_dpo, dpop, nll, dpo_nll)
}
"""Losses by name. A new loss is a new function and its name here."""
BATCHWISE = frozenset({alpha_dpo})
"""Losses that are no means of losses of single pairs: they need the log-probabilities of a whole batch at once."""


def bind(base: str | Callable[..., Any], **available: Any) -> Callable[..., Any]:
    """Fix the parameters of a loss, given by name or as a callable, that occur in its signature.

    What a ``functools.partial`` has fixed stays as it is.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(base, str):
        if base not in LOSSES:
            raise ValueError(f"unknown base loss {base!r}; known: {', '.join(LOSSES)}")
        base = LOSSES[base]
    names = set(inspect.signature(base).parameters) - set(base.keywords if isinstance(base, partial) else ())
    return partial(base, **{name: value for name, value in available.items() if name in names})


def pairwise(base: Callable[..., Any]) -> bool:
    """Whether a loss is known to be a mean over pairs, so that pairs may be taken one after another."""
    while isinstance(base, partial):
        base = base.func
    return base in LOSSES.values() and base not in BATCHWISE
