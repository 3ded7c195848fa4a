"""The two sides of a batch of pairs, and means of metrics over a batch that is processed in parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_ray.core.logps import IGNORE
from spo_ray.core.losses import Metrics


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected sequences of a batch."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], name: str) -> "Side":
        """Take the side ``chosen`` or ``rejected`` of a batch."""
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
        """Return some of the sequences, padded to the longest of them only."""
        width = int(self.sizes[rows].max())
        return Side(self.input_ids[rows, :width], self.labels[rows, :width], self.attention_mask[rows, :width])

    def joined(self, other: "Side") -> "Side":
        """Return these sequences followed by others, padded to one length."""
        width = max(self.labels.shape[1], other.labels.shape[1])

        def pad(tensor: Tensor, value: int) -> Tensor:
            return F.pad(tensor, (0, width - tensor.shape[1]), value=value)

        pairs = (("input_ids", 0), ("labels", IGNORE), ("attention_mask", 0))
        return Side(*(torch.cat([pad(getattr(side, name), fill) for side in (self, other)]) for name, fill in pairs))


class Tally:
    """Means of metrics over a batch that is processed in parts."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sums: Metrics = {}

    def add(self, metrics: Metrics, rows: int) -> None:
        """Add means over some of the batch's rows; with ``rows=0`` only the keys are added."""
        for key, value in metrics.items():
            self.sums[key] = self.sums.get(key, 0.0) + (value * rows / self.rows if rows else 0.0)
