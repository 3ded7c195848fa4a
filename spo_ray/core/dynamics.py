"""How a gradient step moves probabilities: Theorems 1 and 2, Corollaries 1 and 2 of arXiv 2507.07723.

With ``g_y = grad log pi(y|x)``, a step u of the parameters changes log pi(y|x) by ``<g_y, u>`` to first order, and
pi(y|x) by pi(y|x) times that. Plain SGD on DPO with one pair makes the step ``u = alpha * beta * c * (g_w - g_l)``,
with ``c = sigma(-beta * margin)``; SPO's term (d) adds ``alpha * lambda * g_w``. All of it is linear in u: parameter
groups with a rate or lambda of their own are evaluated on their own gradients, and add up.

Log-probabilities are in nats, summed over the completion. The probability of a long completion underflows to 0: there,
read the log forms.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spo_ray.core.running_statistics import AllReduce, single_rank
from spo_ray.core.sharded import local, total

MAX_SEQUENCES = 100_000
CHUNK = 1 << 22  # elements held in float64 at a time: an embedding matrix as a whole would take gigabytes
ROWS = 4096  # prefixes in one forward pass of the enumeration


@dataclass(frozen=True)
class GradientTerms:
    """Norms and inner product of g_w and g_l: all that the theorems need to know of the gradients."""

    norm_chosen: float
    norm_rejected: float
    dot: float

    @classmethod
    def of(
        cls, chosen_grads: Sequence[Tensor], rejected_grads: Sequence[Tensor], all_reduce: AllReduce = single_rank
    ) -> "GradientTerms":
        """The terms of two gradients, lists of tensors in one order, with products in float64 whatever their type.

        ``all_reduce`` sums tensors in place over ranks, where each rank holds a shard of the gradients. The terms of
        nearly parallel gradients are small differences, in which the rounding of the gradients themselves shows.

        Raises:
            ValueError: the lists are empty or differ in length or shapes.
        """
        pairs = ((chosen_grads, chosen_grads), (rejected_grads, rejected_grads), (chosen_grads, rejected_grads))
        products = torch.stack([_inner_product(*pair) for pair in pairs])
        all_reduce([products])
        chosen, rejected, dot = products.tolist()
        return cls(math.sqrt(chosen), math.sqrt(rejected), dot)

    # With the slack, the corollaries hold to the last bit; max() and min() keep a NaN only as their first argument.

    @property
    def slack(self) -> float:
        """``||g_w|| ||g_l|| - <g_w, g_l>``, what the Cauchy-Schwarz inequality gives away; not negative."""
        return max(self.norm_chosen * self.norm_rejected - self.dot, 0.0)

    @property
    def chosen_term(self) -> float:
        """``||g_w||^2 - <g_w, g_l>``: its sign is that of d pi(y_w) under DPO (equation 2)."""
        return self.norm_chosen * (self.norm_chosen - self.norm_rejected) + self.slack

    @property
    def rejected_term(self) -> float:
        """``<g_w, g_l> - ||g_l||^2``: its sign is that of d pi(y_l) under DPO (equation 3)."""
        return self.norm_rejected * (self.norm_chosen - self.norm_rejected) - self.slack

    @property
    def gap_term(self) -> float:
        """``||g_w - g_l||^2``, the difference of the two."""
        return (self.norm_chosen - self.norm_rejected) ** 2 + 2.0 * self.slack

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the gradients; 0 if one vanishes."""
        if not self.norm_chosen or not self.norm_rejected:
            return 0.0
        return max(min(self.dot / self.norm_chosen / self.norm_rejected, 1.0), -1.0)

    @property
    def excess(self) -> float:
        """``R = max(0, ||g_w|| - ||g_l||)`` (equation 77); at 0, pi(y_l) does not rise under DPO (Corollary 1)."""
        return max(self.norm_chosen - self.norm_rejected, 0.0)

    def metrics(self) -> dict[str, float]:
        """The terms under the names of a training log."""
        names = ("chosen_term", "rejected_term", "cosine", "norm_chosen", "norm_rejected")
        return {f"dynamics/{name}": getattr(self, name) for name in names} | {"dynamics/R": self.excess}


@dataclass(frozen=True)
class PairForecast:
    """First-order changes of a pair's log-probabilities (nats) and probabilities in one step."""

    dlogp_chosen: float
    dlogp_rejected: float
    dp_chosen: float
    dp_rejected: float


def dpo_weight(beta: float, margin: float) -> float:
    """``beta * sigma(-beta * margin)``, the factor of g_w - g_l in DPO's step; ``margin = r_w - r_l`` in nats."""
    shrink = math.exp(-abs(beta * margin))  # cannot overflow
    return beta * (shrink if beta * margin > 0 else 1.0) / (1.0 + shrink)


def sgd_forecast(
    terms: GradientTerms,
    logp_chosen: float,
    logp_rejected: float,
    *,
    learning_rate: float,
    weight: float,
    lambda_sft: float = 0.0,
) -> PairForecast:
    """Theorem 1 (equations 2 and 3): one plain SGD step on one pair, to first order.

    The log-probabilities are those before the step. ``learning_rate`` is alpha and ``weight`` is beta * c (see
    :func:`dpo_weight`); ``lambda_sft`` weighs a further loss -log pi(y_w|x), as in SPO.
    """
    chosen = learning_rate * (weight * terms.chosen_term + lambda_sft * terms.norm_chosen**2)
    rejected = learning_rate * (weight * terms.rejected_term + lambda_sft * terms.dot)
    return PairForecast(chosen, rejected, math.exp(logp_chosen) * chosen, math.exp(logp_rejected) * rejected)


def corollary1_bounds(
    terms: GradientTerms, logp_chosen: float, logp_rejected: float, *, learning_rate: float, weight: float
) -> tuple[float, float]:
    """Corollary 1 (equations 4 and 5): a lower bound of d pi(y_w) and an upper bound of d pi(y_l) in Theorem 1's step.

    They are ``alpha * beta * c * pi(y) * ||g_y|| * (||g_w|| - ||g_l||)``, from the norms alone.
    """
    excess = terms.norm_chosen - terms.norm_rejected
    sides = ((logp_chosen, terms.norm_chosen), (logp_rejected, terms.norm_rejected))
    lower, upper = (math.exp(logp) * (learning_rate * (weight * (norm * excess))) for logp, norm in sides)
    return lower, upper


def log_gap_change(terms: GradientTerms, *, learning_rate: float, weight: float, lambda_sft: float = 0.0) -> float:
    """``d log pi(y_w) - d log pi(y_l)`` in one SGD step, to first order: Corollary 2 in its log form.

    Under DPO it is ``alpha * beta * c * ||g_w - g_l||^2 >= 0``. SPO adds ``alpha * lambda * (||g_w||^2 - <g_w, g_l>)``,
    which can be negative.
    """
    return learning_rate * (weight * terms.gap_term + lambda_sft * terms.chosen_term)


def probability_gap_change(
    terms: GradientTerms, logp_chosen: float, logp_rejected: float, *, learning_rate: float, weight: float
) -> float:
    """``d pi(y_w) - d pi(y_l)`` in one SGD step on DPO, to first order: the gap of Corollary 2 as printed (equation 6).

    Unlike the log form it can be negative: for ``g_l = a * g_w`` it is ``alpha * beta * c * ||g_w||^2`` times
    ``(1 - a) * (pi(y_w) - a * pi(y_l))``, which is below 0 for a > 1 and pi(y_w) > a * pi(y_l).
    """
    step = sgd_forecast(terms, logp_chosen, logp_rejected, learning_rate=learning_rate, weight=weight)
    return step.dp_chosen - step.dp_rejected


def forecast(gradient: Sequence[Tensor], update: Sequence[Tensor]) -> float:
    """``<g_y, u>``: first-order change (nats) of log pi(y|x) when the parameters move by ``update``, by any optimizer.

    Raises:
        ValueError: the lists are empty or differ in length or shapes.
    """
    return _inner_product(gradient, update).item()


def adamw_update(
    optimizer: torch.optim.AdamW, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor]:
    """What ``optimizer.step()`` would add to each parameter, given its (clipped) gradient; nothing is changed.

    State and options are the optimizer's own. A parameter whose gradient is None stays. The update is not rounded, as a
    real step is, to what the parameter can hold.

    Raises:
        TypeError: the optimizer is not AdamW.
        ValueError: a parameter is not the optimizer's, or the lists differ in length.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        raise TypeError(f"the update rule of {type(optimizer).__name__} is not known, only AdamW's")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if len(parameters) != len(gradients) or any(id(p) not in groups for p in parameters):
        raise ValueError("each parameter must be the optimizer's and have one gradient, or None")
    with torch.no_grad():
        return [
            torch.zeros_like(p) if g is None else _adamw_update(p, g, groups[id(p)], optimizer.state.get(p, {}))
            for p, g in zip(parameters, gradients, strict=True)
        ]


def _adamw_update(parameter: Tensor, gradient: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """AdamW's update of one parameter; Loshchilov and Hutter, arXiv 1711.05101, algorithm 2."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    rate, step = float(group["lr"]), float(state.get("step", 0)) + 1
    gradient = gradient.to(parameter.dtype) * (-1 if group["maximize"] else 1)
    mean, square = gradient * (1 - beta1), gradient.square() * (1 - beta2)
    if state:  # empty before the first step
        mean, square = mean + state["exp_avg"] * beta1, square + state["exp_avg_sq"] * beta2
        square = torch.maximum(square, state["max_exp_avg_sq"]) if group["amsgrad"] else square
    scale = (square / (1 - beta2**step)).sqrt().add_(group["eps"])
    return mean.div_(scale).mul_(-rate / (1 - beta1**step)).sub_(parameter, alpha=rate * group["weight_decay"])


def mass_shift(before: Tensor, after: Tensor, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Where probability mass went (Theorem 2): the change of each group's, and under ``rest`` of all other; sum 0.

    ``before`` and ``after`` are log-probabilities [N] of distinct outputs of one prompt; ``groups`` names positions,
    such as ``{"chosen": [0], "rejected": [1], "top": [2]}``. Outputs beyond the N belong to the rest.

    Raises:
        ValueError: the tensors differ in shape, a position occurs twice or does not exist, or a group is named rest.
    """
    if before.ndim != 1 or before.shape != after.shape:
        raise ValueError(f"two vectors of one length are needed, got {tuple(before.shape)} and {tuple(after.shape)}")
    indices = [i for group in groups.values() for i in group]
    if len(set(indices)) < len(indices) or not all(0 <= i < len(before) for i in indices) or "rest" in groups:
        raise ValueError(f"groups must be disjoint, within [0, {len(before)}) and not named 'rest', got {dict(groups)}")
    before, after = before.detach().double(), after.detach().double()
    high, low = torch.maximum(before, after), torch.minimum(before, after)
    # A difference of two exponentials would lose small changes to cancellation.
    change = torch.where(high == -math.inf, 0.0, -high.exp() * torch.expm1(low - high) * torch.sign(after - before))
    shift = {name: change[list(group)].sum().item() for name, group in groups.items()}
    return shift | {"rest": 0.0 - math.fsum(shift.values())}


def top_alternative(logps: Tensor, chosen_index: int) -> int:
    """Position of y* in ``logps`` [N], the most probable output that is not y_w (Theorem 2); it may be y_l.

    Raises:
        ValueError: fewer than two outputs, or no output at ``chosen_index``.
    """
    others = [i for i in range(len(logps)) if i != chosen_index]
    if not 0 < len(others) < len(logps):
        raise ValueError(f"no alternative to output {chosen_index} among {len(logps)}")
    return others[int(logps[others].argmax())]


def sequence_logps(
    model: nn.Module, prompt_ids: Sequence[int] | Tensor, vocabulary: int, length: int, eos: int | None = None
) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every output of a model with a tiny vocabulary: N token tuples and their log-probabilities, float64 [N].

    Outputs are all sequences of ``length`` tokens, cut after the first ``eos`` if one is given, shorter ones first:
    none is a prefix of another, and their probabilities sum to 1. Gradients flow through the log-probabilities.

    ``model`` maps ``input_ids`` [B, T] to an output with ``logits`` of V = ``vocabulary`` entries; its dropout must be
    off. ``prompt_ids`` [T] are one token or more, on the model's device if a tensor.

    Raises:
        ValueError: V**length is above 100,000, V is not the model's, or an argument is out of range.
    """
    prompt = torch.as_tensor(prompt_ids)
    if vocabulary < 2 or length < 1 or prompt.ndim != 1 or not len(prompt) or eos not in (None, *range(vocabulary)):
        raise ValueError("needed: vocabulary >= 2, length >= 1, a prompt vector of a token or more, eos < vocabulary")
    if vocabulary ** min(length, 64) > MAX_SEQUENCES:  # 2**64 is more already
        raise ValueError(f"{vocabulary}**{length} sequences are too many to enumerate: at most {MAX_SEQUENCES:,}")
    going = torch.tensor([token for token in range(vocabulary) if token != eos], device=prompt.device)
    ids, logps = prompt[None], torch.zeros(1, dtype=torch.float64, device=prompt.device)
    done, done_logps = [], []
    for _ in range(length):
        logits = torch.cat([model(input_ids=part).logits[:, -1] for part in ids.split(ROWS)])
        if logits.shape[-1] != vocabulary:
            raise ValueError(f"the model has a vocabulary of {logits.shape[-1]}, not {vocabulary}")
        longer = logps[:, None] + logits.double().log_softmax(dim=-1)  # [prefixes, V]
        if eos is not None:
            done += [(*prefix, eos) for prefix in ids[:, len(prompt) :].tolist()]
            done_logps.append(longer[:, eos])
        logps = longer[:, going].flatten()
        ids = torch.cat([ids.repeat_interleave(len(going), 0), going.repeat(len(ids))[:, None]], dim=1)
    return done + [tuple(s) for s in ids[:, len(prompt) :].tolist()], torch.cat([*done_logps, logps])


def first_order_mass(logps: Tensor, jacobian: Sequence[Tensor], update: Sequence[Tensor]) -> Tensor:
    """``d pi(y) = pi(y) * <g_y, u>`` of N outputs, float64 [N]; over all outputs of a prompt it sums to 0 (Theorem 2).

    ``jacobian`` holds the gradients g_y for each parameter, [N, *shape], and ``update`` what the parameter moves by.

    Raises:
        ValueError: the lists differ in length.
    """
    pairs = [(g.detach().double(), step.detach().double()) for g, step in zip(jacobian, update, strict=True)]
    changes = torch.stack([g.reshape(len(g), -1) @ step.flatten() for g, step in pairs]).sum(dim=0)
    return logps.detach().double().exp() * changes


def _inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """``<left, right>`` of two lists of tensors, each as one vector, in float64; over all ranks for shards."""
    if len(left) != len(right) or not left or any(a.shape != b.shape for a, b in zip(left, right, strict=False)):
        raise ValueError("two lists of tensors of the same shapes are needed, with one tensor at least")
    parts = [
        torch.dot(x.double(), y.double())
        for a, b in zip(left, right, strict=True)
        for x, y in zip(local(a).flatten().split(CHUNK), local(b).flatten().split(CHUNK), strict=True)
    ]
    return total(torch.stack([part.to(parts[0].device) for part in parts]).sum(), left)
