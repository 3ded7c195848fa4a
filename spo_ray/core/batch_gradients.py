"""Forward and backward passes over a batch of pairs, a few pairs at a time, into weighted sums of gradients."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spo_ray.core.directional import DirectionalDerivative
from spo_ray.core.gradients import GradientAccumulator, Gradients, accumulate, grad_only_for, perturbed, rounds_products
from spo_ray.core.joint_pass import JointPass, scaled_rows, seeds
from spo_ray.core.lm_head import find_head
from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import Metrics, PairLogps, SftReduction, pairwise
from spo_ray.core.moves import shifted
from spo_ray.core.running_statistics import AllReduce
from spo_ray.core.sharded import is_sharded
from spo_ray.core.shared_prompt import can_share, pair_logps, prompt_lengths
from spo_ray.core.sides import Side, Tally

TOKENS_PER_BACKWARD = {"cpu": 256, "cuda": 8192}
"""Tokens of one side that share a backward, by device: with fewer the hardware is partly idle."""
SHARDED_TOKENS_PER_BACKWARD = 2048
"""Minimum of the same for sharded parameters, because every backward gathers all parameters again."""

KEPT_TOKENS = 512
"""Most tokens of a pass for exact derivatives that keeps its graph; a pass over more computes layers again.

The graph holds several tensors of attention scores for each layer.
"""

JOINT_PADDING = 1.05
"""Largest ratio of tokens in one pass over both sides to tokens in a pass for each side, which needs less padding."""


def tokens_per_backward(device: str, sharded: bool = False) -> int:
    """Return the number of tokens of one side that share a backward on a type of device."""
    usual = TOKENS_PER_BACKWARD.get(device, TOKENS_PER_BACKWARD["cuda"])
    return max(usual, SHARDED_TOKENS_PER_BACKWARD) if sharded else usual


FALL = 1e-3
"""Smallest decrease of a log-probability (nats) that counts as a fall; a smaller one is rounding."""


@dataclass(frozen=True)
class Sums:
    """Gradients of all parameters summed over a batch, and metrics."""

    total: Gradients
    """Gradient of the base loss, of what a visitor adds for every pair, and a joint pass's penalty."""
    sft: Gradients
    """Gradient of the chosen log-probabilities with the weights ``sft``; empty without weights or in a joint pass."""
    chosen: Gradients
    """Gradient of the chosen log-probabilities with the weights ``norms[0]``; empty without weights."""
    rejected: Gradients
    """Gradient of the rejected log-probabilities with the weights ``norms[1]``; empty without weights."""
    tally: Tally


Visitor = Callable[[tuple[Side, Side], tuple[Gradients, Gradients], Tally], Gradients]
"""Function of a pair and the gradients of its two log-probabilities; returns a gradient to add, or an empty list."""


class BatchGradients:
    """Forward and backward passes of one step over a batch, for a model's parameters (theta first).

    Collective: all ranks must call the same methods.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[Tensor],
        batch: Mapping[str, Tensor],
        all_reduce: AllReduce,
        pairs_per_backward: int | None = None,
        chunk_tokens: int | None = None,
        share_prompt: bool | None = None,
    ) -> None:
        self.model, self.params, self.all_reduce = model, list(params), all_reduce
        self.sharded = is_sharded(params)
        if self.sharded and not pairs_per_backward:
            raise ValueError("sharded parameters need pairs_per_backward: all ranks must make the same passes")
        self.chosen, self.rejected = Side.of(batch, "chosen"), Side.of(batch, "rejected")
        self.reference = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
        self.score_gaps = batch.get("score_gaps")
        self.chunk_tokens, self.device = chunk_tokens, batch["chosen_labels"].device
        share = self.device.type == "cpu" if share_prompt is None else share_prompt
        self.share_prompt = share and not self.sharded  # ranks may differ in which pairs can share their prompt
        self.rows = list(range(len(self.chosen.labels)))
        valid = batch.get("valid", torch.ones(len(self.rows), dtype=torch.bool, device=self.device))
        self.valid, self.local = valid.double(), int(valid.sum())
        self.parts = self.split(pairs_per_backward)
        counts = torch.stack([self.valid.sum(), (self.chosen.lengths * self.valid).sum()])
        all_reduce([counts])
        self.pairs, self.tokens = (int(count) for count in counts)

    def split(self, pairs_per_backward: int | None) -> list[list[int]]:
        """Return the rows of each backward, sorted by length to keep the padding small."""
        sizes = torch.maximum(self.chosen.sizes, self.rejected.sizes).tolist()
        count = pairs_per_backward or max(1, tokens_per_backward(self.device.type) // max(sizes))
        order = sorted(self.rows, key=lambda i: -sizes[i])
        return [order[i : i + count] for i in range(0, len(order), count)]

    def logps(self, side: Side) -> Tensor:
        """Return log-probabilities [B] of completions."""
        inputs = (side.input_ids, side.labels, side.attention_mask)
        return completion_logps(self.model, *inputs, chunk_tokens=self.chunk_tokens)[0]

    def gradient(
        self, side: Side, weights: Tensor, params: Sequence[Tensor] | None = None, *, own: bool = False
    ) -> tuple[float, Gradients]:
        """Return ``sum_i weights_i * logps_i`` and its gradient for all or some of the parameters.

        The sum is over all ranks' sequences, or over ``own`` ones that share a backward and are no padding.
        """
        sink, value = GradientAccumulator(self.params if params is None else params), 0.0
        with grad_only_for(sink.params, self.params):
            for part, share in self.weighted(side, weights, own=own):
                logps = self.logps(part)
                value += (logps.detach() * share).sum().item()
                accumulate(logps, [(sink, share)])
        return self.of_all_ranks(value, sink.gradients(), own=own)

    def directional(
        self,
        side: Side,
        weights: Tensor,
        moving: Sequence[Tensor],
        directions: Gradients,
        wanted: Sequence[Tensor],
        *,
        shift: float = 0.0,
        own: bool = False,
    ) -> tuple[float, Gradients]:
        """Return the derivative of ``sum_i weights_i * logps_i`` along directions, and the gradient of it.

        See :class:`spo_ray.core.directional.DirectionalDerivative`, and :meth:`gradient` for ``own``.
        """
        again = self.sharded or any(m.training and hasattr(m, "gradient_checkpointing") for m in self.model.modules())
        value, sink = 0.0, GradientAccumulator(wanted)
        derivative = DirectionalDerivative(
            self.model, moving, directions, sink, shift=shift, chunk_tokens=self.chunk_tokens
        )
        for part, share in self.weighted(side, weights, own=own):
            recompute = again or part.labels.numel() > KEPT_TOKENS
            value += derivative.of(part.input_ids, part.labels, part.attention_mask, share, recompute=recompute)
        return self.of_all_ranks(value, sink.gradients(), own=own)

    def weighted(self, side: Side, weights: Tensor, *, own: bool) -> Generator[tuple[Side, Tensor]]:
        """Yield the sequences of each backward with their weights; 0 for padding rows."""
        if own:
            yield side, weights
            return
        for rows in self.parts:
            yield side.rows(rows), (weights * self.valid)[rows]

    def of_all_ranks(self, value: float, gradients: Gradients, *, own: bool) -> tuple[float, Gradients]:
        """Sum a value and its gradients over all ranks, unless they are of this rank's ``own`` sequences."""
        if own:
            return value, gradients
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.all_reduce([total])
        return total.item(), self.sum_over_ranks(gradients)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type whose precision forward passes have: autocast's, or the parameters' own.

        It is float16 for float32 products in TensorFloat-32, which has as many digits.
        """
        device = self.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        found = getattr(self.model, "compute_dtype", None) or autocast or self.params[0].dtype
        return torch.float16 if found == torch.float32 and rounds_products() else found

    @property
    def half_precision(self) -> bool:
        """True if forward passes are in bfloat16 or float16."""
        return self.compute_dtype in (torch.bfloat16, torch.float16)

    @contextmanager
    def displaced(self, params: Sequence[Tensor], direction: Gradients, scale: float = 1.0) -> Generator[None]:
        """Compute at ``params + scale * direction`` in the context, without rounding the sum to half precision.

        ``direction`` may be overwritten.
        """
        move = shifted if self.half_precision else perturbed
        with move(*((self.model,) if self.half_precision else ()), params, direction, scale):
            yield

    def sum_over_ranks(self, gradients: Gradients) -> Gradients:
        """Sum gradients over all ranks in place; sharded gradients are summed already."""
        if not self.sharded:
            self.all_reduce(gradients)
        return gradients

    def mean_weights(self) -> tuple[Tensor, Tensor]:
        """Return weights [B] of both sides that give the batch-mean log-probability."""
        weights = torch.full((len(self.rows),), 1.0 / self.pairs, dtype=torch.float64, device=self.device)
        return weights, weights

    def sft_weights(self, reduction: SftReduction) -> Tensor:
        """Return weights [B] of log pi(y_w) that give L_SFT."""
        count = self.pairs if reduction == "sum" else self.tokens
        return torch.full((len(self.rows),), -1.0 / count, dtype=torch.float64, device=self.device)

    def means(self, tally: "Tally") -> Metrics:
        """Return the metrics: ``spo/*`` over all ranks, all others over this rank's pairs."""
        own = [key for key in tally.sums if key.startswith("spo/")]
        values = torch.tensor([tally.sums[key] for key in own], dtype=torch.float64, device=self.device)
        values *= self.local / self.pairs
        self.all_reduce([values])
        # divided by the tokens of all ranks, so that the mean of ranks is the mean over tokens
        nll = -tally.sums["logps/chosen"] * self.pairs / self.tokens
        return tally.sums | {"nll_loss": nll} | dict(zip(own, values.tolist(), strict=True))

    def accumulate(
        self,
        base: Callable[..., Any],
        sft: Tensor | None = None,
        norms: tuple[Tensor, Tensor] | None = None,
        visit: Visitor | None = None,
        *,
        proportional: bool = False,
        joint: JointPass | None = None,
    ) -> Sums:
        """Run one forward and backward of every pair and sum the gradients.

        Args:
            base: the base loss as a function of :class:`spo_ray.core.losses.PairLogps`.
            sft: weights [B] of the chosen sequences for ``Sums.sft``.
            norms: weights [B] of the chosen and of the rejected sequences for ``Sums.chosen`` and ``Sums.rejected``.
            visit: called with every pair and its gradients; pairs then are processed one by one.
            proportional: ``sft`` and ``norms[0]`` differ by a factor only, so that one sum serves both.
            joint: adds its ``penalty`` times the gradient with the weights ``sft`` to theta's part of ``Sums.total``,
                with both sides in one backward where that is possible; ``Sums.sft`` then is empty. Not with ``norms``
                or ``visit``.
        """
        total, sft_sum, chosen, rejected = (GradientAccumulator(self.params) for _ in range(4))
        tally = Tally(self.local)
        parts = [[i] for i in self.rows] if visit else self.parts
        ahead = None if pairwise(base) or len(parts) == 1 else self.precompute_weights(base, tally)
        factor = 0.0 if sft is None or norms is None or not proportional else (norms[0][0] / sft[0]).item()
        sft = None if sft is None else sft * self.valid  # padding rows have no weight
        norms = None if norms is None else (norms[0] * self.valid, norms[1] * self.valid)
        for rows in parts:
            sides = self.chosen.rows(rows), self.rejected.rows(rows)

            def weigh(logps_w: Tensor, logps_l: Tensor, rows: Sequence[int] = rows) -> tuple[Tensor, Tensor]:
                self.add_logp_metrics(rows, logps_w, logps_l, tally, sft)
                known = self.loss_weights(base, rows, logps_w, logps_l, tally) if ahead is None else ahead[:, rows]
                return known[0], known[1]

            sft_rows = None if sft is None else sft[rows]
            if joint and self.accumulate_jointly(joint, sides, weigh, total, sft_sum, sft_rows):
                continue
            logps_w, logps_l = (self.logps(side) for side in sides)
            weights = weigh(logps_w, logps_l)
            to_w, to_l = [(total, weights[0])], [(total, weights[1])]
            if sft_rows is not None:
                to_w.append((sft_sum, sft_rows))
            if norms is not None:
                to_w += [] if factor else [(chosen, norms[0][rows])]
                to_l.append((rejected, norms[1][rows]))
            own = GradientAccumulator(self.params), GradientAccumulator(self.params)
            if visit:
                to_w.append((own[0], torch.ones_like(logps_w)))
                to_l.append((own[1], torch.ones_like(logps_l)))
            accumulate(logps_w, to_w)
            accumulate(logps_l, to_l)
            if visit:
                self.visit_pair(visit, sides, own, bool(self.valid[rows].any()), total, tally)
        if joint:
            joint.add_penalty(total, sft_sum)
        sums = Sums(
            total.gradients(),
            sft_sum.gradients() if sft is not None and not joint else [],
            chosen.gradients() if norms is not None and not factor else [],
            rejected.gradients() if norms is not None else [],
            tally,
        )
        self.sum_over_ranks([*sums.total, *sums.sft, *sums.chosen, *sums.rejected])
        return replace(sums, chosen=[g * factor for g in sums.sft]) if factor else sums

    def accumulate_jointly(
        self,
        joint: JointPass,
        sides: tuple[Side, Side],
        weigh: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        total: GradientAccumulator,
        sft_sum: GradientAccumulator,
        sft: Tensor | None,
    ) -> bool:
        """Add the gradients of some pairs with one backward of each sequence; return False if that is impossible.

        Both sides go through one pass, or through one each if they need much less padding then. Sharded parameters
        always take one pass, which gathers them once and sums its gradients over ranks layer by layer. (In one backward
        through two passes the whole gradient of one would wait for that of the other.)
        """
        logps = self.shared_prompt_logps(sides) if sft is None else None
        if logps is not None:
            accumulate(logps, [(total, torch.cat(weigh(*logps.chunk(2))))])
            return True
        if joint.adapters is None:
            return False
        widths = [side.labels.shape[1] for side in sides]
        apart = not self.sharded and 2 * max(widths) > JOINT_PADDING * sum(widths)
        first = sides[0] if apart else sides[0].joined(sides[1])
        # Outside of the context: no row of this side is scaled, also when checkpointed layers are recomputed.
        logps_l = self.logps(sides[1]) if apart else None
        with scaled_rows(joint.adapters, tuple(first.labels.shape)) as rows:
            logps = self.logps(first)
            both = logps if logps_l is None else torch.cat([logps, logps_l])
            base, of_rejected = torch.cat(weigh(*both.chunk(2))).to(logps).tensor_split([len(logps)])
            lower = torch.zeros_like(base)
            if sft is not None:
                lower[: len(sft)] = sft
            if rows.complete:
                weights, rows.ratios = seeds(base, joint.penalty * lower)
                accumulate(logps, [(total, weights)])
            else:
                joint.adapters = None  # this model needs two sums
                accumulate(logps, [(total, base), (sft_sum, lower)])
        if logps_l is not None:
            accumulate(logps_l, [(total, of_rejected)])
        return True

    @staticmethod
    def visit_pair(
        visit: Visitor,
        sides: tuple[Side, Side],
        own: tuple[GradientAccumulator, GradientAccumulator],
        counts: bool,
        total: GradientAccumulator,
        tally: Tally,
    ) -> None:
        """Call ``visit`` for one pair; add its gradient and metrics unless the pair is padding."""
        seen = Tally(1)
        grads = visit(sides, (own[0].gradients(), own[1].gradients()), seen)
        tally.add(seen.sums, int(counts))  # padding adds the keys, because all ranks must have the same
        total.add_all(grads if counts else [])

    def add_logp_metrics(
        self, rows: Sequence[int], logps_w: Tensor, logps_l: Tensor, tally: "Tally", sft: Tensor | None = None
    ) -> None:
        """Add mean log-probabilities and their change since the reference model to the metrics; with weights L_SFT."""
        valid = self.valid[rows].bool()
        sides = zip(("chosen", "rejected"), (logps_w, logps_l), self.reference, strict=True)
        changes = []
        for side, logps, reference in sides:
            own = logps.detach()[valid]
            changes.append(own - reference[rows][valid])
            tally.add({f"logps/{side}": own.mean().item(), f"logps/{side}_change": changes[-1].mean().item()}, len(own))
        both = torch.stack(changes).lt(-FALL).all(dim=0).double().mean().item()
        tally.add({"logps/both_fell": both}, int(valid.sum()))
        if sft is not None:
            loss = (sft[rows] * logps_w.detach())[valid].mean().item() * self.pairs
            tally.add({"spo/sft_loss": loss}, int(valid.sum()))

    def shared_prompt_logps(self, sides: tuple[Side, Side]) -> Tensor | None:
        """Return log-probabilities [2B] of both sides from one pass over a shared prompt, or None if impossible."""
        head = find_head(self.model, self.chosen.input_ids) if self.share_prompt and can_share(self.model) else None
        if head is None:
            return None
        chosen, rejected = ((side.input_ids, side.labels) for side in sides)
        prompts = prompt_lengths(chosen, rejected)
        if prompts is None:
            return None
        return pair_logps(self.model, head, chosen, rejected, prompts, self.chunk_tokens)

    def precompute_weights(self, base: Callable[..., Any], tally: "Tally") -> Tensor:
        """Return weights [2, B] of a base loss of the whole batch, from passes without gradients."""
        sides = torch.empty(2, len(self.rows), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for rows in self.parts:
                for i, side in enumerate((self.chosen, self.rejected)):
                    sides[i, rows] = self.logps(side.rows(rows)).double()
        return torch.stack(self.loss_weights(base, self.rows, *sides, tally))

    def loss_weights(
        self, base: Callable[..., Any], rows: Sequence[int], logps_w: Tensor, logps_l: Tensor, tally: "Tally"
    ) -> tuple[Tensor, Tensor]:
        """Return dL/du_w and dL/du_l [B] of the mean base loss over all ranks' pairs; 0 for padding rows."""
        valid = self.valid[rows].bool()
        leaf_w, leaf_l = (logps.detach()[valid].requires_grad_() for logps in (logps_w, logps_l))
        references = (value[rows][valid].to(leaf_w) for value in self.reference)
        lengths = (side.lengths[rows][valid] for side in (self.chosen, self.rejected))
        gaps = None if self.score_gaps is None else self.score_gaps[rows][valid].to(leaf_w)
        pairs = PairLogps(leaf_w, leaf_l, *references, *lengths, self.tokens / self.pairs, self.all_reduce, gaps)
        result = base(pairs)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        tally.add({"loss": loss.mean().item(), **metrics}, len(leaf_w))
        share = loss.mean() * (len(leaf_w) / self.pairs)
        grads = torch.autograd.grad(share, (leaf_w, leaf_l), allow_unused=True, materialize_grads=True)
        weight_w, weight_l = (torch.zeros_like(logps_w).masked_scatter(valid, grad) for grad in grads)
        return weight_w, weight_l
