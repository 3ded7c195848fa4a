"""CHES scores: which pairs lower the probability of their chosen response, told before training.

Razin et al., "Unintentional unalignment: likelihood displacement in direct preference optimization", arXiv 2410.08847.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spo_ray.core.logps import IGNORE
from spo_ray.model.collate import collate


class Ches(NamedTuple):
    """Centered hidden embedding similarity of the two responses of a pair; the larger, the more displacement."""

    ches: float
    """``<S_w, S_l> - |S_w|^2``, where S sums the hidden embeddings from which a response's tokens are predicted."""
    ches_per_token: float
    """The same with means instead of sums, so that it does not depend on the lengths."""


def ches_scores(
    model: nn.Module, rows: Sequence[Mapping[str, Any]], pad_id: int, rows_at_once: int, device: str = "cpu"
) -> list[Ches]:
    """Return the scores of tokenised pairs, from one forward pass of the model without its head for each response."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt_ids"]) + len(rows[i]["chosen_ids"]))
    found: dict[int, Ches] = {}
    for start in range(0, len(order), rows_at_once):
        indices = order[start : start + rows_at_once]
        chosen, rejected = (
            _sums(model, [rows[i] for i in indices], f"{side}_ids", pad_id, device) for side in ("chosen", "rejected")
        )
        for i, w, losing in zip(indices, chosen, rejected, strict=True):
            n_w, n_l = len(rows[i]["chosen_ids"]), len(rows[i]["rejected_ids"])
            both, own = torch.dot(w, losing).item(), torch.dot(w, w).item()
            found[i] = Ches(both - own, both / (n_w * n_l) - own / n_w**2)
    return [found[i] for i in range(len(rows))]


@torch.inference_mode()
def _sums(model: Any, rows: Sequence[Mapping[str, Any]], side: str, pad_id: int, device: str) -> Tensor:
    """Return the sums [B, D] of hidden embeddings, after the last norm, at the positions before a response's tokens."""
    batch = {key: v.to(device) for key, v in collate([(r["prompt_ids"], r[side]) for r in rows], pad_id).items()}
    predicted = batch.pop("labels")[:, 1:] != IGNORE
    hidden = model.base_model(**batch, use_cache=False).last_hidden_state[:, :-1]
    return (hidden.double() * predicted.unsqueeze(-1)).sum(1)
