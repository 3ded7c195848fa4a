"""Preference losses as free functions of sequence log-probabilities.

Every loss takes four tensors [B] first, in nats, summed over the completion: the policy's log-probability of the chosen
and of the rejected response, then the reference model's; parameters follow by keyword, lengths (tokens, [B]) among
them where the loss needs them. It returns ``(loss, metrics)``: the mean over pairs, and floats under TRL's names.
With r = log pi(y|x) - log pi_ref(y|x), rewards are beta * r (Rafailov et al., arXiv 2305.18290).
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Metrics = dict[str, float]
SftReduction = Literal["sum", "token_mean"]


def dpo(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor, *, beta: float
) -> tuple[Tensor, Metrics]:
    """``-log sigma(beta * (r_w - r_l))``: equation (1); Rafailov et al., arXiv 2305.18290, equation 7."""
    rewards_w = beta * (chosen_logps - ref_chosen_logps)
    rewards_l = beta * (rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(rewards_w - rewards_l).mean(), reward_metrics(rewards_w, rewards_l)


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
    mu: float,
    mean_chosen_length: float,
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


LOSSES: dict[str, Callable[..., tuple[Tensor, Metrics]]] = {"dpo": dpo, "simpo": simpo, "nll": nll, "dpo_nll": dpo_nll}
"""Losses by name. A new loss is a new function and a line here."""


def bind(base: str | Callable[..., Any], **available: Any) -> Callable[..., Any]:
    """Fix the parameters of a loss, given by name or as a callable, that occur in its signature.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(base, str):
        if base not in LOSSES:
            raise ValueError(f"unknown base loss {base!r}; known: {', '.join(LOSSES)}")
        base = LOSSES[base]
    names = inspect.signature(base).parameters
    return partial(base, **{name: value for name, value in available.items() if name in names})
