"""Log-probabilities of rows under the model in training, over all ranks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from spo_ray.config.train import TrainConfig
from spo_ray.core.batch_gradients import FALL
from spo_ray.core.logps import completion_logps
from spo_ray.core.losses import Metrics
from spo_ray.errors import TrainingError
from spo_ray.model.collate import TokenRow, collate, collate_pairs, rows_at_once
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.train.data_loader import RowTable
from spo_ray.train.distributed import Distributed

DRIFT_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 5e-2}
"""Largest mean difference per token (nats) between the policy before step 0 and the stored reference."""
CHECKED_PAIRS = 32
MEANS = ("logps/chosen", "logps/rejected", "delta_logp_chosen", "delta_logp_rejected", "accuracy", "both_fell")


class Measure:
    """A model's log-probabilities, measured by all ranks together: every method is a collective."""

    def __init__(self, model: nn.Module, chat: ChatTokenizer, config: TrainConfig, rank: Distributed) -> None:
        self.model, self.chat, self.config, self.rank = model, chat, config, rank

    def pair_means(self, table: RowTable, numbers: Sequence[int]) -> Metrics:
        """Means over pairs: log-probabilities, their change since the reference, accuracy, share in which both fell."""
        sums = torch.zeros(len(MEANS), dtype=torch.float64, device=self.rank.device)
        for batch, valid in self.pairs(table, numbers):
            chosen, rejected = (self.side(batch, side) for side in ("chosen", "rejected"))
            gain_w, gain_l = chosen - batch["ref_chosen_logps"], rejected - batch["ref_rejected_logps"]
            both = (gain_w < -FALL) & (gain_l < -FALL)
            columns = (chosen, rejected, gain_w, gain_l, (gain_w > gain_l).double(), both.double())
            sums += torch.stack([(column.double() * valid).sum() for column in columns])
        self.rank.all_reduce([sums])
        return dict(zip(MEANS, (sums / len(numbers)).tolist(), strict=True)) | {"n": len(numbers)}

    def mean_logp(self, table: Sequence[TokenRow]) -> float:
        """Mean log-probability of completions (nats)."""
        total = torch.zeros((), dtype=torch.float64, device=self.rank.device)
        for rows, valid in self.batches(table):
            tensors = self.rank.to_device(collate(rows, self.chat.pad_id))
            logps = self.side({f"any_{key}": value for key, value in tensors.items()}, "any")
            total += (logps.double() * valid).sum()
        self.rank.all_reduce([total])
        return total.item() / len(table)

    def check_reference(self, table: RowTable) -> None:
        """Before step 0 the policy is the reference: anything else means stale or mismatched log-probabilities.

        Raises:
            TrainingError: they differ; the DPO loss would not start at ln 2.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self.rank.device)
        for batch, valid in self.pairs(table, range(min(len(table), CHECKED_PAIRS))):
            gap = (self.side(batch, "chosen") - batch["ref_chosen_logps"]).abs().double()
            tokens = (batch["chosen_labels"] >= 0).sum(dim=1)
            sums += torch.stack([(gap * valid).sum(), (tokens * valid).sum()])
        self.rank.all_reduce([sums])
        difference, tokens = sums.tolist()
        if tokens and not difference / tokens <= DRIFT_TOLERANCE[self.config.precision]:
            raise TrainingError(
                f"the policy before step 0 differs from the stored reference by {difference / tokens:.2g} nats a "
                "token: the reference log-probabilities belong to another model, tokenizer or precision"
            )

    def pairs(self, table: RowTable, numbers: Sequence[int]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Some of a table's pairs in batches; see :meth:`batches`."""
        for own, valid in self.batches(numbers):
            yield self.rank.to_device(collate_pairs(table.rows(own), self.chat.pad_id)), valid

    def batches(self, items: Sequence[Any]) -> Iterator[tuple[list[Any], Tensor]]:
        """Some items, the part of this rank, in batches for inference; and which of them count (0 or 1)."""
        own, counts = self.rank.shard_with_padding(items)
        size = rows_at_once(self.config.max_length)  # the same for all ranks, whatever their rows
        for start in range(0, len(own), size):
            valid = torch.tensor(counts[start : start + size], dtype=torch.float64, device=self.rank.device)
            yield own[start : start + size], valid

    @torch.no_grad()
    def side(self, batch: Mapping[str, Tensor], side: str) -> Tensor:
        """Log-probabilities [B] of one side of a batch."""
        self.model.eval()
        keys = ("input_ids", "labels", "attention_mask")
        with compute_type(self.model, self.config, self.rank):
            return completion_logps(self.model, *(batch[f"{side}_{key}"] for key in keys))[0]


def compute_type(model: nn.Module, config: TrainConfig, rank: Distributed) -> AbstractContextManager[Any]:
    """Autocast to the compute type; a sharded model sees to that itself."""
    enabled = config.precision == "bfloat16" and not hasattr(model, "compute_dtype")
    return torch.autocast(rank.device.type, dtype=torch.bfloat16, enabled=enabled)
