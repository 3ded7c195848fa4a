"""Forward and backward passes over a batch of pairs, a few pairs at a time, into weighted sums of gradients."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spo_ray.core.gradients import GradientAccumulator, Gradients, accumulate, grad_only_for
from spo_ray.core.lm_head import find_head
from spo_ray.core.logps import IGNORE, completion_logps
from spo_ray.core.losses import Metrics, PairLogps, SftReduction, pairwise
from spo_ray.core.running_statistics import AllReduce
from spo_ray.core.sharded import is_sharded
from spo_ray.core.shared_prompt import can_share, pair_logps, prompt_lengths

TOKENS_PER_BACKWARD = {"cpu": 256, "cuda": 8192}
"""Pairs share a backward until one side has so many tokens: fewer leave the hardware idle."""
SHARDED_TOKENS_PER_BACKWARD = 2048
"""At least so many where parameters are sharded: every backward gathers them all anew."""


def tokens_per_backward(device: str, sharded: bool = False) -> int:
    """The tokens of one side that share a backward on a type of device."""
    usual = TOKENS_PER_BACKWARD.get(device, TOKENS_PER_BACKWARD["cuda"])
    return max(usual, SHARDED_TOKENS_PER_BACKWARD) if sharded else usual


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected sequences of a batch."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], name: str) -> "Side":
        return cls(batch[f"{name}_input_ids"], batch[f"{name}_labels"], batch[f"{name}_attention_mask"])

    @property
    def sizes(self) -> Tensor:
        """Tokens of each sequence [B], prompt included."""
        return self.attention_mask.sum(dim=1)

    @property
    def lengths(self) -> Tensor:
        """Completion tokens of each sequence [B]."""
        return (self.labels[:, 1:] != IGNORE).sum(dim=1)

    def rows(self, rows: Sequence[int]) -> "Side":
        """Some of the sequences, without the padding that only their neighbours need."""
        width = int(self.sizes[rows].max())
        return Side(self.input_ids[rows, :width], self.labels[rows, :width], self.attention_mask[rows, :width])

    def joined(self, other: "Side") -> "Side":
        """These sequences, then others; padded to one length."""
        width = max(self.labels.shape[1], other.labels.shape[1])

        def pad(tensor: Tensor, value: int) -> Tensor:
            return F.pad(tensor, (0, width - tensor.shape[1]), value=value)

        pairs = (("input_ids", 0), ("labels", IGNORE), ("attention_mask", 0))
        return Side(*(torch.cat([pad(getattr(side, name), fill) for side in (self, other)]) for name, fill in pairs))


FALL = 1e-3
"""A smaller change of a log-probability (nats) is rounding, not a fall."""


class Tally:
    """Means of metrics over a batch that is seen in parts."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sums: Metrics = {}

    def add(self, metrics: Metrics, rows: int) -> None:
        """Means over some of the batch's rows; over none they only make the keys known."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0.0) + (value * rows / self.rows if rows else 0.0)


@dataclass(frozen=True)
class Sums:
    """What one sweep over a batch gives: gradients for all parameters, and metrics."""

    total: Gradients
    """Of the base loss, and of what was added to every pair."""
    sft: Gradients
    chosen: Gradients
    rejected: Gradients
    """Of the sums over sequences with the given weights; empty without weights."""
    tally: Tally


Visitor = Callable[[tuple[Side, Side], tuple[Gradients, Gradients], Tally], Gradients]
"""Sees one pair and the gradients of its two log-probabilities; gives a gradient to add to the total, or none."""


class BatchGradients:
    """The passes of one step: a model, its parameters (theta first), a batch, and how ranks add up."""

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
        self.chunk_tokens, self.device = chunk_tokens, batch["chosen_labels"].device
        share = self.device.type == "cpu" if share_prompt is None else share_prompt
        self.share_prompt = share and not self.sharded  # which pairs can be shared may differ between ranks
        self.rows = list(range(len(self.chosen.labels)))
        valid = batch.get("valid", torch.ones(len(self.rows), dtype=torch.bool, device=self.device))
        self.valid, self.local = valid.double(), int(valid.sum())
        self.parts = self.split(pairs_per_backward)
        counts = torch.stack([self.valid.sum(), (self.chosen.lengths * self.valid).sum()])
        all_reduce([counts])
        self.pairs, self.tokens = (int(count) for count in counts)

    def split(self, pairs_per_backward: int | None) -> list[list[int]]:
        """Pairs that go through a backward together: neighbours in length, so that padding is little."""
        sizes = torch.maximum(self.chosen.sizes, self.rejected.sizes).tolist()
        count = pairs_per_backward or max(1, tokens_per_backward(self.device.type) // max(sizes))
        order = sorted(self.rows, key=lambda i: -sizes[i])
        return [order[i : i + count] for i in range(0, len(order), count)]

    def logps(self, side: Side) -> Tensor:
        """Log-probabilities of completions [B]."""
        inputs = (side.input_ids, side.labels, side.attention_mask)
        return completion_logps(self.model, *inputs, chunk_tokens=self.chunk_tokens)[0]

    def gradient(self, side: Side, weights: Tensor, params: Sequence[Tensor] | None = None) -> Gradients:
        """Gradient of ``sum_i weights_i * logps_i`` over all ranks, for all or some of the parameters."""
        sink = GradientAccumulator(self.params if params is None else params)
        with grad_only_for(sink.params, self.params):
            for rows in self.parts:
                accumulate(self.logps(side.rows(rows)), [(sink, (weights * self.valid)[rows])])
        return self.summed(sink.gradients())

    def summed(self, gradients: Gradients) -> Gradients:
        """The sum over all ranks; sharded gradients are that already."""
        if not self.sharded:
            self.all_reduce(gradients)
        return gradients

    def gradient_here(self, side: Side, weights: Tensor) -> Gradients:
        """The same for sequences of this rank alone, for all parameters, in one backward."""
        sink = GradientAccumulator(self.params)
        accumulate(self.logps(side), [(sink, weights)])
        return sink.gradients()

    def mean_weights(self) -> tuple[Tensor, Tensor]:
        """The batch-mean log-probability as weights [B] of both sides."""
        weights = torch.full((len(self.rows),), 1.0 / self.pairs, dtype=torch.float64, device=self.device)
        return weights, weights

    def sft_weights(self, reduction: SftReduction) -> Tensor:
        """L_SFT as weights [B] of log pi(y_w)."""
        count = self.pairs if reduction == "sum" else self.tokens
        return torch.full((len(self.rows),), -1.0 / count, dtype=torch.float64, device=self.device)

    def means(self, tally: "Tally") -> Metrics:
        """Metrics of this rank's pairs, those of SPO's own terms over all ranks."""
        own = [key for key in tally.sums if key.startswith("spo/")]
        values = torch.tensor([tally.sums[key] for key in own], dtype=torch.float64, device=self.device)
        values *= self.local / self.pairs
        self.all_reduce([values])
        # per token of all ranks: the mean over pairs of these is the mean over tokens
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
    ) -> Sums:
        """One forward and backward of every pair, into sums of gradients.

        Args:
            base: the base loss, bound.
            sft: weights [B] of the chosen sequences in a sum of their own.
            norms: weights [B] of the chosen and of the rejected sequences in sums of their own.
            visit: called for every pair with its gradients; pairs then go one by one.
            proportional: ``sft`` and the first of ``norms`` are the same but for a factor, so that one sum serves both.
        """
        total, sft_sum, chosen, rejected = (GradientAccumulator(self.params) for _ in range(4))
        tally = Tally(self.local)
        parts = [[i] for i in self.rows] if visit else self.parts
        ahead = None if pairwise(base) or len(parts) == 1 else self.precompute_weights(base, tally)
        factor = 0.0 if sft is None or norms is None or not proportional else (norms[0][0] / sft[0]).item()
        sft = None if sft is None else sft * self.valid  # rows that only fill up count for nothing
        norms = None if norms is None else (norms[0] * self.valid, norms[1] * self.valid)
        alone = sft is None and norms is None and visit is None
        for rows in parts:
            sides = self.chosen.rows(rows), self.rejected.rows(rows)
            both = self.at_once(sides) if alone else None
            logps_w, logps_l = (self.logps(side) for side in sides) if both is None else both.chunk(2)
            self.watch(rows, logps_w, logps_l, tally)
            weights = self.loss_weights(base, rows, logps_w, logps_l, tally) if ahead is None else ahead[:, rows]
            if both is not None:
                accumulate(both, [(total, torch.cat([*weights]))])
                continue
            to_w, to_l = [(total, weights[0])], [(total, weights[1])]
            if sft is not None:
                to_w.append((sft_sum, sft[rows]))
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
                self.show(visit, sides, own, bool(self.valid[rows].any()), total, tally)
        sums = Sums(
            total.gradients(),
            sft_sum.gradients() if sft is not None else [],
            chosen.gradients() if norms is not None and not factor else [],
            rejected.gradients() if norms is not None else [],
            tally,
        )
        self.summed([*sums.total, *sums.sft, *sums.chosen, *sums.rejected])
        return replace(sums, chosen=[g * factor for g in sums.sft]) if factor else sums

    @staticmethod
    def show(
        visit: Visitor,
        sides: tuple[Side, Side],
        own: tuple[GradientAccumulator, GradientAccumulator],
        counts: bool,
        total: GradientAccumulator,
        tally: Tally,
    ) -> None:
        """Let a pair be visited, and add what comes of it if it counts."""
        seen = Tally(1)
        grads = visit(sides, (own[0].gradients(), own[1].gradients()), seen)
        tally.add(seen.sums, int(counts))  # of a pair that only fills up the names: all ranks must have the same
        total.add_all(grads if counts else [])

    def watch(self, rows: Sequence[int], logps_w: Tensor, logps_l: Tensor, tally: "Tally") -> None:
        """Mean log-probabilities and what became of them since the reference: the displacement."""
        valid = self.valid[rows].bool()
        sides = zip(("chosen", "rejected"), (logps_w, logps_l), self.reference, strict=True)
        changes = []
        for side, logps, reference in sides:
            own = logps.detach()[valid]
            changes.append(own - reference[rows][valid])
            tally.add({f"logps/{side}": own.mean().item(), f"logps/{side}_change": changes[-1].mean().item()}, len(own))
        both = torch.stack(changes).lt(-FALL).all(dim=0).double().mean().item()
        tally.add({"logps/both_fell": both}, int(valid.sum()))

    def at_once(self, sides: tuple[Side, Side]) -> Tensor | None:
        """Log-probabilities [2B] of both sides in one pass, where that is of use; else None.

        Sharded parameters are gathered once for a pass, and its gradients are summed over the ranks layer by layer. (In
        one backward through two passes the whole gradient of one would wait for that of the other.)
        """
        return self.logps(sides[0].joined(sides[1])) if self.sharded else self.shared(sides)

    def shared(self, sides: tuple[Side, Side]) -> Tensor | None:
        """Log-probabilities [2B] of both sides in one pass over a shared prompt; None where there is no such pass."""
        head = find_head(self.model, self.chosen.input_ids) if self.share_prompt and can_share(self.model) else None
        if head is None:
            return None
        chosen, rejected = ((side.input_ids, side.labels) for side in sides)
        prompts = prompt_lengths(chosen, rejected)
        if prompts is None:
            return None
        return pair_logps(self.model, head, chosen, rejected, prompts, self.chunk_tokens)

    def precompute_weights(self, base: Callable[..., Any], tally: "Tally") -> Tensor:
        """Weights for a base loss that needs the whole batch at once: log-probabilities first, without gradients."""
        sides = torch.empty(2, len(self.rows), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for rows in self.parts:
                for i, side in enumerate((self.chosen, self.rejected)):
                    sides[i, rows] = self.logps(side.rows(rows)).double()
        return torch.stack(self.loss_weights(base, self.rows, *sides, tally))

    def loss_weights(
        self, base: Callable[..., Any], rows: Sequence[int], logps_w: Tensor, logps_l: Tensor, tally: "Tally"
    ) -> tuple[Tensor, Tensor]:
        """dL/du_w and dL/du_l [B] of the mean base loss over all ranks' pairs; 0 for rows that only fill up."""
        valid = self.valid[rows].bool()
        leaf_w, leaf_l = (logps.detach()[valid].requires_grad_() for logps in (logps_w, logps_l))
        references = (value[rows][valid].to(leaf_w) for value in self.reference)
        lengths = (side.lengths[rows][valid] for side in (self.chosen, self.rejected))
        pairs = PairLogps(leaf_w, leaf_l, *references, *lengths, self.tokens / self.pairs, self.all_reduce)
        result = base(pairs)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        tally.add({"loss": loss.mean().item(), **metrics}, len(leaf_w))
        share = loss.mean() * (len(leaf_w) / self.pairs)
        grads = torch.autograd.grad(share, (leaf_w, leaf_l), allow_unused=True, materialize_grads=True)
        weight_w, weight_l = (torch.zeros_like(logps_w).masked_scatter(valid, grad) for grad in grads)
        return weight_w, weight_l
