"""Preference losses as functions ``loss(batch, *, parameters) -> (loss, metrics)`` of a :class:`PairLogps`.

The loss is the mean over pairs; metrics are floats under TRL's names. In the equations u = log pi(y|x),
r = u - log pi_ref(y|x), n = length in tokens, _w chosen, _l rejected. Rewards are beta * r, or what takes its place in
the loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_ray.core.running_statistics import AllReduce, RunningStatistics, single_rank

Metrics = dict[str, float]
SftReduction = Literal["sum", "token_mean"]


@dataclass(frozen=True)
class PairLogps:
    """Logps of B pairs, summed over the completion (nats), and lengths of completions in tokens."""

    chosen: Tensor
    """Logps [B] of the chosen responses under the policy."""
    rejected: Tensor
    """Logps [B] of the rejected responses under the policy."""
    ref_chosen: Tensor
    """Logps [B] of the chosen responses under the reference model."""
    ref_rejected: Tensor
    """Logps [B] of the rejected responses under the reference model."""
    chosen_lengths: Tensor
    """Tokens [B] of the chosen responses."""
    rejected_lengths: Tensor
    """Tokens [B] of the rejected responses."""
    mean_chosen_length: float
    """Mean over the pairs of the whole batch and all ranks."""
    all_reduce: AllReduce = single_rank
    """Sums tensors in place over ranks, for losses with statistics of all pairs."""
    score_gaps: Tensor | None = None
    """Score of the chosen response minus that of the rejected one [B], from the data; None: unknown."""

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios r_w and r_l [B] of policy and reference."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def gaps(self) -> Tensor:
        """``score_gaps``; raises a ValueError where they are unknown."""
        if self.score_gaps is None:
            raise ValueError("this loss needs the pairs' scores: the batch has no 'score_gaps'")
        return self.score_gaps

    def rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """Return ``beta * r_w`` and ``beta * r_l``, DPO's implicit rewards [B]."""
        ratio_w, ratio_l = self.ratios
        return beta * ratio_w, beta * ratio_l

    def mean_rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """Return ``beta * u_w / n_w`` and ``beta * u_l / n_l``, SimPO's rewards [B]."""
        return beta * self.chosen / self.chosen_lengths, beta * self.rejected / self.rejected_lengths


Loss = Callable[..., tuple[Tensor, Metrics]]
"""A function of :class:`PairLogps` and of parameters by keyword."""


def dpo(batch: PairLogps, *, beta: float) -> tuple[Tensor, Metrics]:
    """``-log sigma(beta * (r_w - r_l))``: equation (1); Rafailov et al., arXiv 2305.18290, equation 7."""
    rewards_w, rewards_l = batch.rewards(beta)
    return -F.logsigmoid(rewards_w - rewards_l).mean(), reward_metrics(rewards_w, rewards_l)


def cdpo(batch: PairLogps, *, beta: float, label_smoothing: float = 0.1) -> tuple[Tensor, Metrics]:
    """``(1 - e) l(z) + e l(-z)`` with ``l = -log sigma``, ``z = beta (r_w - r_l)``: conservative DPO.

    For labels that are wrong with probability e; Mitchell, "A note on DPO with noisy preferences", 2023.
    """
    rewards_w, rewards_l = batch.rewards(beta)
    z = rewards_w - rewards_l
    losses = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return losses.mean(), reward_metrics(rewards_w, rewards_l)


def robust_dpo(batch: PairLogps, *, beta: float, label_smoothing: float = 0.1) -> tuple[Tensor, Metrics]:
    """``((1 - e) l(z) - e l(-z)) / (1 - 2e)``: DPO's loss without bias under labels flipped with probability e < 1/2.

    Chowdhury et al., arXiv 2403.00409.
    """
    rewards_w, rewards_l = batch.rewards(beta)
    z = rewards_w - rewards_l
    losses = label_smoothing * F.logsigmoid(-z) - (1 - label_smoothing) * F.logsigmoid(z)
    return losses.mean() / (1 - 2 * label_smoothing), reward_metrics(rewards_w, rewards_l)


def ipo(batch: PairLogps, *, beta: float, ipo_reduction: Literal["mean", "sum"] = "mean") -> tuple[Tensor, Metrics]:
    """``(h - 1 / (2 beta))^2``, ``h = r_w / n_w - r_l / n_l`` (``mean``, as in TRL) or ``r_w - r_l`` (``sum``).

    Azar et al., arXiv 2310.12036, equation 17; beta is its tau.
    """
    ratio_w, ratio_l = batch.ratios
    scaled = ipo_reduction == "mean"
    h = ratio_w / batch.chosen_lengths - ratio_l / batch.rejected_lengths if scaled else ratio_w - ratio_l
    return ((h - 1 / (2 * beta)) ** 2).mean(), reward_metrics(*batch.rewards(beta))


def simpo(batch: PairLogps, *, beta: float, margin: float) -> tuple[Tensor, Metrics]:
    """``-log sigma(beta * (u_w / n_w - u_l / n_l) - margin)``; Meng et al., arXiv 2405.14734.

    Reference-free. The margin is absolute: the paper's gamma, not its ratio gamma / beta.
    """
    rewards_w, rewards_l = batch.mean_rewards(beta)
    return -F.logsigmoid(rewards_w - rewards_l - margin).mean(), reward_metrics(rewards_w, rewards_l)


def alpha_dpo(
    batch: PairLogps, *, beta: float, margin: float, alpha: float = 0.5, statistics: RunningStatistics | None = None
) -> tuple[Tensor, Metrics]:
    """``-log sigma(z0 - stopgrad(margin + alpha * zscore(g)))``: a margin that adapts to every pair.

    ``z0 = beta * (u_w / n_w - u_l / n_l)`` and g the same without beta, less the reference's; Wu et al., arXiv
    2410.10148. The public trainer has alpha inside beta: alpha here is beta * alpha there. The z-score is over
    ``statistics``, which are updated with every step's g before they are used (None: over this batch alone).
    """
    rewards_w, rewards_l = batch.mean_rewards(beta)
    with torch.no_grad():
        ratio_w, ratio_l = batch.ratios
        gap = ratio_w / batch.chosen_lengths - ratio_l / batch.rejected_lengths
        statistics = RunningStatistics() if statistics is None else statistics
        statistics.update(gap, batch.all_reduce)
        target = margin + alpha * statistics.zscore(gap)
    metrics = reward_metrics(rewards_w, rewards_l) | {"alpha_dpo/margin": target.mean().item()}
    return -F.logsigmoid(rewards_w - rewards_l - target).mean(), metrics


def dpop(batch: PairLogps, *, beta: float, penalty: float = 50.0) -> tuple[Tensor, Metrics]:
    """``-log sigma(beta * (r_w - r_l - penalty * max(0, -r_w)))``: DPO-Positive; Pal et al., arXiv 2402.13228."""
    ratio_w, ratio_l = batch.ratios
    losses = -F.logsigmoid(beta * (ratio_w - ratio_l - penalty * torch.relu(-ratio_w)))
    return losses.mean(), reward_metrics(*batch.rewards(beta))


def odpo(
    batch: PairLogps, *, beta: float, alpha: float = 1.0, scaling: Literal["log", "linear"] = "log"
) -> tuple[Tensor, Metrics]:
    """``-log sigma(beta (r_w - r_l) - alpha f(s_w - s_l))`` with the data's scores s: DPO with an offset.

    f is the logarithm or the identity; Amini et al., arXiv 2402.10571. A log of a gap below 1 lowers the margin.
    """
    rewards_w, rewards_l = batch.rewards(beta)
    offsets = alpha * (batch.gaps.log() if scaling == "log" else batch.gaps)
    metrics = reward_metrics(rewards_w, rewards_l) | {"odpo/offset": offsets.mean().item()}
    return -F.logsigmoid(rewards_w - rewards_l - offsets).mean(), metrics


def rpo(batch: PairLogps, *, beta: float, eta: float = 1.0) -> tuple[Tensor, Metrics]:
    """``q log(q / p) + (1 - q) log((1 - q) / (1 - p))``, where ``p = sigma(beta (r_w - r_l))``, ``q = sigma(eta gap)``.

    Reward-aware preference optimization: the rewards' gap has a finite target, ``eta`` times the gap of the data's
    scores. Nvidia, Nemotron-4 340B, arXiv 2406.11704, section 3.3.2; the same as ``rpo_bwd_kl`` in NeMo.
    """
    rewards_w, rewards_l = batch.rewards(beta)
    z, target = rewards_w - rewards_l, eta * batch.gaps
    losses = torch.sigmoid(target) * (F.logsigmoid(target) - F.logsigmoid(z))
    losses = losses + torch.sigmoid(-target) * (F.logsigmoid(-target) - F.logsigmoid(-z))
    return losses.mean(), reward_metrics(rewards_w, rewards_l)


def apo_zero(batch: PairLogps, *, beta: float) -> tuple[Tensor, Metrics]:
    """``1 - sigma(beta r_w) + sigma(beta r_l)``: raises chosen and lowers rejected responses, each for itself.

    Anchored preference optimization for chosen responses that are better than the model's own; D'Oosterlinck et al.,
    arXiv 2408.06266, equation 7.
    """
    rewards_w, rewards_l = batch.rewards(beta)
    return (torch.sigmoid(-rewards_w) + torch.sigmoid(rewards_l)).mean(), reward_metrics(rewards_w, rewards_l)


def apo_down(batch: PairLogps, *, beta: float) -> tuple[Tensor, Metrics]:
    """``sigma(beta r_w) + 1 - sigma(beta (r_w - r_l))``: lowers chosen responses, and rejected ones further.

    Anchored preference optimization for chosen responses that are worse than the model's own; D'Oosterlinck et al.,
    arXiv 2408.06266, equation 8.
    """
    rewards_w, rewards_l = batch.rewards(beta)
    losses = torch.sigmoid(rewards_w) + torch.sigmoid(rewards_l - rewards_w)
    return losses.mean(), reward_metrics(rewards_w, rewards_l)


def nca(batch: PairLogps, *, beta: float) -> tuple[Tensor, Metrics]:
    """``l(beta r_w) + (l(-beta r_w) + l(-beta r_l)) / 2`` with ``l = -log sigma``: noise contrastive alignment.

    For pairs. It holds every reward by itself, not their difference; Chen et al., arXiv 2402.05369.
    """
    rewards_w, rewards_l = batch.rewards(beta)
    losses = -F.logsigmoid(rewards_w) - 0.5 * (F.logsigmoid(-rewards_w) + F.logsigmoid(-rewards_l))
    return losses.mean(), reward_metrics(rewards_w, rewards_l)


def exo_pair(batch: PairLogps, *, beta: float, label_smoothing: float = 1e-3) -> tuple[Tensor, Metrics]:
    """``q log(q / (1 - e)) + (1 - q) log((1 - q) / e)``, ``q = sigma(beta (r_w - r_l))``: efficient exact optimization.

    The reverse KL divergence from the smoothed label, with 0 < e < 1; Ji et al., arXiv 2402.00856, equation 16.
    """
    rewards_w, rewards_l = batch.rewards(beta)
    z = rewards_w - rewards_l
    losses = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    losses = losses + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))
    return losses.mean(), reward_metrics(rewards_w, rewards_l)


def slic(batch: PairLogps, *, beta: float) -> tuple[Tensor, Metrics]:
    """``max(0, 1 - beta (r_w - r_l))``: SLiC's hinge on DPO's rewards.

    Zhao et al., arXiv 2305.10425, with log-ratios instead of log-probabilities as in Liu et al., arXiv 2309.06657.
    """
    rewards_w, rewards_l = batch.rewards(beta)
    return torch.relu(1 - rewards_w + rewards_l).mean(), reward_metrics(rewards_w, rewards_l)


def dpo_shift(batch: PairLogps, *, beta: float, shift: float = 0.75) -> tuple[Tensor, Metrics]:
    """``-log sigma(beta (r_w - f r_l))`` with ``shift`` f in (0, 1]: DPO that presses rejected responses down less.

    Yang et al., arXiv 2502.07599, with the fixed strategy for f(lambda).
    """
    rewards_w, rewards_l = batch.rewards(beta)
    return -F.logsigmoid(rewards_w - shift * rewards_l).mean(), reward_metrics(rewards_w, rewards_l)


def cal_dpo(batch: PairLogps, *, beta: float) -> tuple[Tensor, Metrics]:
    """``-log sigma(r_w - r_l) + (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2``: calibrated DPO.

    The log-ratios have targets of their own, so r_w can't fall without a cost; Xiao et al., arXiv 2412.14516,
    algorithm 1. Its beta is only in the targets.
    """
    ratio_w, ratio_l = batch.ratios
    target = 1 / (2 * beta)
    losses = -F.logsigmoid(ratio_w - ratio_l) + (ratio_w - target) ** 2 + (ratio_l + target) ** 2
    return losses.mean(), reward_metrics(*batch.rewards(beta))


def cpo(
    batch: PairLogps, *, beta: float, mu: float = 1.0, sft_reduction: SftReduction = "token_mean"
) -> tuple[Tensor, Metrics]:
    """``-log sigma(beta (u_w - u_l)) + mu * L_SFT``: contrastive preference optimization, without a reference model.

    Xu et al., arXiv 2401.08417, equations 3 and 5; the public trainer takes L_SFT per token.
    """
    rewards_w, rewards_l = beta * batch.chosen, beta * batch.rejected
    loss = -F.logsigmoid(rewards_w - rewards_l).mean()
    sft = sft_loss(batch.chosen, batch.mean_chosen_length, sft_reduction)
    return loss + mu * sft, reward_metrics(rewards_w, rewards_l)


def orpo(
    batch: PairLogps, *, beta: float, mu: float = 1.0, sft_reduction: SftReduction = "token_mean"
) -> tuple[Tensor, Metrics]:
    """``-beta * log sigma(odds(m_w) - odds(m_l)) + mu * L_SFT``: odds ratio preference optimization.

    Reference-free. ``m = u / n`` and ``odds(m) = m - log(1 - exp(m))``, the log odds; Hong et al., arXiv 2403.07691,
    equations 4 to 7.
    """
    means = batch.mean_rewards(1.0)
    odds = [m - torch.log(-torch.expm1(m.clamp(max=-torch.finfo(m.dtype).eps))) for m in means]
    loss = -beta * F.logsigmoid(odds[0] - odds[1]).mean()
    sft = sft_loss(batch.chosen, batch.mean_chosen_length, sft_reduction)
    return loss + mu * sft, reward_metrics(*batch.mean_rewards(beta))


def nll(batch: PairLogps, *, sft_reduction: SftReduction = "sum") -> tuple[Tensor, Metrics]:
    """``L_SFT`` on the chosen responses alone: mean of -log pi(y_w|x) (equation 72), or per token."""
    return sft_loss(batch.chosen, batch.mean_chosen_length, sft_reduction), {}


def dpo_nll(
    batch: PairLogps, *, beta: float, mu: float = 1.0, sft_reduction: SftReduction = "sum"
) -> tuple[Tensor, Metrics]:
    """``L_DPO + mu * L_SFT`` on all parameters; Pang et al., arXiv 2404.19733, which takes L_SFT per token."""
    loss, metrics = dpo(batch, beta=beta)
    return loss + mu * sft_loss(batch.chosen, batch.mean_chosen_length, sft_reduction), metrics


def sft_loss(logps: Tensor, mean_length: float, reduction: SftReduction) -> Tensor:
    """Return ``L_SFT``, minus the mean of the completions' logps (``sum``), or the same per token (``token_mean``).

    ``token_mean`` divides by the mean length over the whole batch, because one rank knows its own completions only.
    """
    return -logps.mean() if reduction == "sum" else -logps.mean() / mean_length


def reward_metrics(rewards_chosen: Tensor, rewards_rejected: Tensor) -> Metrics:
    """Return TRL's ``rewards/*`` metrics, means over pairs."""
    with torch.no_grad():
        margins = rewards_chosen - rewards_rejected
        return {
            "rewards/chosen": rewards_chosen.mean().item(),
            "rewards/rejected": rewards_rejected.mean().item(),
            "rewards/margins": margins.mean().item(),
            "rewards/accuracies": (margins > 0).double().mean().item(),
        }


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        *(dpo, cdpo, robust_dpo, ipo, simpo, alpha_dpo, dpop, dpo_shift, cal_dpo, odpo, rpo),
        *(apo_zero, apo_down, nca, exo_pair, slic, cpo, orpo, nll, dpo_nll),
    )
}
"""Losses by name. For a new one write the function, list it here, look at ``PARAMETERS`` and ``BATCHWISE``, and add its
class to ``MethodConfig`` (and ``Base``) in ``config/methods.py``."""
PARAMETERS = {"simpo": ("beta", "margin"), "alpha_dpo": ("beta", "margin"), "nll": ()}
"""Which of beta and margin a loss of :data:`LOSSES` takes; all others take beta."""
BATCHWISE = frozenset({alpha_dpo})
"""Losses of which a pair's value depends on the other pairs: they need the logps of the whole batch at once."""


def bind(base: str | Callable[[PairLogps], Any], *, beta: float, margin: float = 0.0) -> Callable[[PairLogps], Any]:
    """Return a base loss as a function of the batch: a callable as it is, a loss by name with its parameters.

    Raises:
        ValueError: an unknown name.
    """
    if callable(base):
        return base
    if base not in LOSSES:
        raise ValueError(f"unknown base loss {base!r}; known: {', '.join(LOSSES)}")
    values = {"beta": beta, "margin": margin}
    return partial(LOSSES[base], **{name: values[name] for name in PARAMETERS.get(base, ("beta",))})


def pairwise(base: Callable[..., Any]) -> bool:
    """Return True if a loss is known to be a mean over pairs, so that pairs may be processed one after another."""
    while isinstance(base, partial):
        base = base.func
    return base in LOSSES.values() and base not in BATCHWISE
