"""The SPO step: Algorithm 1 of arXiv 2507.07723, terms (a) to (e).

One call gives the gradient of the bilevel objective ``F = L_pref + lambda * (L_SFT - L_SFT*(phi)) + gamma * R``
(equation 9) for the backbone theta and the adapters phi:

    phi:    (a) grad L_pref  + (b) lambda * [grad L_SFT(theta, phi) - grad L_SFT(theta_hat, phi)]  + gamma * grad R
    theta:  (c) grad L_pref  + (d) lambda * grad L_SFT(theta, phi)                                 + (e) gamma * grad R

``theta_hat`` is theta after K steps of size eta on L_SFT (equation 11), and ``R = max(0, ||g_w|| - ||g_l||)``
(equation 77) with ``g = grad log pi(y|x)``. With lambda = gamma = K = 0 a step is the base loss alone, so every
preference method is trained by this function.

Cost in units of a forward of one sequence, with a backward as two: a pair's base loss takes 6. The backward of y_w also
gives (d), the move to theta_hat for K = 1 and the norms in R. (b) takes 2 more as a difference, 6 or 8 exactly
(:mod:`spo_ray.core.lower_level`), and every further inner step 3. The gradient of R takes 6 by differences, 12 exactly
(:mod:`spo_ray.core.hinge`), only if the hinge is active. With K = gamma = 0, (d) is free however many pairs share a
backward (:mod:`spo_ray.core.joint_pass`). Gradients are means over the pairs of the batch, summed over data-parallel
ranks by ``all_reduce``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from spo_ray.core.batch_gradients import BatchGradients
from spo_ray.core.dynamics import GradientTerms
from spo_ray.core.gradients import Gradients, add, deterministic
from spo_ray.core.hinge import Hinge
from spo_ray.core.joint_pass import JointPass, lora_linears
from spo_ray.core.losses import Metrics, SftReduction, bind
from spo_ray.core.lower_level import InnerMethod, LowerLevel
from spo_ray.core.running_statistics import AllReduce, single_rank


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
    inner_method: InnerMethod = "auto",
    term_b_weight: float = 1.0,
    margin: float = 0.0,
    norm_of: Literal["sum", "mean"] = "sum",
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
            Optional are ``score_gaps`` [B], for losses that read scores, and ``valid`` [B]: False for padding rows,
            which give all ranks as many rows and count for nothing.
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
        inner_method: how (b) is computed (:mod:`spo_ray.core.lower_level`): by ``exact`` derivatives, by a
            ``difference`` of gradients, or ``auto``. With ``exact`` grad R is exact too.
        term_b_weight: factor of (b): m if a step in m computes it.
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
        ValueError: an unknown base, option or parameter name, a negative ``inner_steps``, an empty completion,
            ``hinge="pair"`` with sharded parameters, for which no pair's own gradient exists, or
            ``inner_method="exact"`` with a model that has parts without such derivatives.
    """
    _check(inner_steps, pairs_per_backward, (norm_scope, hinge, inner_method, sft_reduction, norm_of))
    n = len(backbone)
    scope = {"all": slice(None), "backbone": slice(n), "adapters": slice(n, None)}[norm_scope]
    with deterministic(model, [*backbone, *adapters]) as named:
        passes = BatchGradients(
            model, list(named.values()), batch, all_reduce, pairs_per_backward, chunk_tokens, share_prompt
        )
        sft = passes.sft_weights(sft_reduction) if lambda_sft else None
        steps = inner_steps if adapters else 0
        lower = LowerLevel(passes, n, sft, lambda_sft, steps, eta, inner_method, term_b_weight)
        regularizer = Hinge(passes, gamma, hinge, scope, norm_of == "mean", inner_method == "exact")
        base_loss = bind(base, beta=beta, margin=margin)
        total, metrics = _objective(passes, base_loss, lower, regularizer, side_gradients)
        return dict(zip(named, total, strict=True)), metrics


def _objective(
    passes: BatchGradients,
    base: Callable[..., Any],
    lower: LowerLevel,
    regularizer: Hinge,
    side_gradients: dict[str, Gradients] | None,
) -> tuple[Gradients, Metrics]:
    """Return the gradient of F.

    The passes over the pairs give terms (a) and (c) and the sums that the other terms need; then R's gradient with (e),
    (d) and (b) are added.
    """
    whole, n = regularizer.gamma > 0 and regularizer.kind == "batch", lower.n_backbone
    plain = passes.mean_weights()
    norms = regularizer.weights() if whole else plain if side_gradients is not None else None
    per_token = whole and regularizer.mean
    visit = regularizer.of_pair if regularizer.gamma > 0 and not whole else None
    if visit and passes.sharded:
        raise ValueError("sharded backward passes give no pair's own gradient: use hinge='batch', or whole parameters")
    joint = None
    # With shards a further pass for L_SFT alone sends less than separate passes of both sides.
    if norms is None and visit is None and (lower.weights is None or not lower.steps or passes.sharded):
        adapters = [] if lower.weights is None else lora_linears(passes.model, passes.params[n:])
        joint = JointPass(lower.lambda_sft, n, adapters)
    sums = passes.accumulate(base, lower.weights, norms, visit, proportional=not per_token, joint=joint)
    total, metrics = sums.total, passes.means(sums.tally)
    if whole:
        metrics |= regularizer.add_to(total, sums)
    if side_gradients is not None:
        sides = (passes.chosen, passes.rejected)
        own = (sums.chosen, sums.rejected)
        if per_token:
            own = tuple(passes.gradient(s, w)[1] for s, w in zip(sides, plain, strict=True))
        chosen, rejected = own
        side_gradients |= {"chosen": chosen, "rejected": rejected}
        metrics |= GradientTerms.of(chosen, rejected).metrics()
    if lower.weights is not None:
        if not joint:
            add(total[:n], sums.sft[:n], lower.lambda_sft)
        if lower.steps:
            sft = passes.gradient(passes.chosen, lower.weights)[1] if joint else sums.sft
            metrics |= lower.add_term_b(total, sft, metrics["spo/sft_loss"])
    return total, metrics


CHOICES = {
    "norm_scope": ("all", "backbone", "adapters"),
    "hinge": ("batch", "pair"),
    "inner_method": get_args(InnerMethod),
    "sft_reduction": ("sum", "token_mean"),
    "norm_of": ("sum", "mean"),
}


def _check(inner_steps: int, pairs_per_backward: int | None, chosen: Sequence[str]) -> None:
    if inner_steps < 0:
        raise ValueError(f"inner_steps must not be negative, got {inner_steps}")
    if pairs_per_backward is not None and pairs_per_backward < 1:
        raise ValueError(f"pairs_per_backward must be at least 1, got {pairs_per_backward}")
    for (name, known), value in zip(CHOICES.items(), chosen, strict=True):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
