"""Log-probabilities of rows under the model in training, computed by all ranks together."""

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
MEANS = (
    *("logps/chosen", "logps/rejected", "delta_logp_chosen", "delta_logp_rejected", "accuracy", "both_fell"),
    "delta_logp_chosen_per_token",
)


class Measure:
    """Evaluator of a model in training. Every method that takes rows is collective: call it on all ranks."""

    def __init__(self, model: nn.Module, chat: ChatTokenizer, config: TrainConfig, rank: Distributed) -> None:
        self.model, self.chat, self.config, self.rank = model, chat, config, rank

    def pair_logps(self, table: RowTable, numbers: Sequence[int]) -> Tensor:
        """Return logps of the chosen and the rejected sides and their changes since the reference, [5, N] in nats.

        The last row is the chosen side's change per token.
        """
        found = torch.zeros(5, len(numbers), dtype=torch.float64, device=self.rank.device)
        for own, valid in self._batches(range(len(numbers))):
            batch = self.rank.to_device(collate_pairs(table.rows([numbers[i] for i in own]), self.chat.pad_id))
            sides = torch.stack([self._logps(batch, f"{side}_").double() for side in ("chosen", "rejected")])
            before = torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
            places = torch.tensor(own, device=self.rank.device)[valid.bool()]
            per_token = (sides[:1] - before[:1]) / (batch["chosen_labels"] >= 0).sum(dim=1)
            found[:, places] = torch.cat([sides, sides - before, per_token])[:, valid.bool()]
        self.rank.all_reduce([found])
        return found

    def pair_means(self, table: RowTable, numbers: Sequence[int]) -> Metrics:
        """Return means over pairs: logps (nats), their change since the reference, accuracy, share where both fell.

        The change of the chosen logps is there per token too, as a mean over pairs.
        """
        return means(self.pair_logps(table, numbers))

    def mean_logp(self, table: Sequence[TokenRow]) -> float:
        """Return the mean logp of the completions, in nats."""
        total = torch.zeros((), dtype=torch.float64, device=self.rank.device)
        for rows, valid in self._batches(table):
            logps = self._logps(self.rank.to_device(collate(rows, self.chat.pad_id)))
            total += (logps.double() * valid).sum()
        self.rank.all_reduce([total])
        return total.item() / len(table)

    def check_reference(self, table: RowTable) -> None:
        """Check before step 0 that the policy gives the stored reference logps.

        Raises:
            TrainingError: the logps differ, so the DPO loss would not start at ln 2.
        """
        numbers = range(min(len(table), CHECKED_PAIRS))
        difference = self.pair_logps(table, numbers)[2].abs().sum().item()
        tokens = sum(len(row["chosen_ids"]) for row in table.rows(numbers))
        if tokens and not difference / tokens <= DRIFT_TOLERANCE[self.config.precision]:
            raise TrainingError(
                f"the policy before step 0 differs from the stored reference by {difference / tokens:.2g} nats per "
                "token: the reference log-probabilities belong to another model, tokenizer or precision"
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to the compute type; disabled for a sharded model, which casts by itself."""
        enabled = self.config.precision == "bfloat16" and not hasattr(self.model, "compute_dtype")
        return torch.autocast(self.rank.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _batches(self, items: Sequence[Any]) -> Iterator[tuple[list[Any], Tensor]]:
        """Yield this rank's items in batches for inference, each with a mask [B] that is 0 for padding."""
        own, counts = self.rank.shard_with_padding(items)
        size = rows_at_once(self.config.max_length)  # the same on all ranks, whatever their rows
        for start in range(0, len(own), size):
            valid = torch.tensor(counts[start : start + size], dtype=torch.float64, device=self.rank.device)
            yield own[start : start + size], valid

    @torch.no_grad()
    def _logps(self, batch: Mapping[str, Tensor], prefix: str = "") -> Tensor:
        """Return the logps [B] of a batch, or of the side of a batch of pairs whose keys have the prefix."""
        self.model.eval()
        keys = ("input_ids", "labels", "attention_mask")
        with self.autocast():
            return completion_logps(self.model, *(batch[f"{prefix}{key}"] for key in keys))[0]


def means(logps: Tensor) -> Metrics:
    """Return the means of :meth:`Measure.pair_means` of what :meth:`Measure.pair_logps` returned."""
    gain_w, gain_l = logps[2:4]
    shares = torch.stack([gain_w > gain_l, (gain_w < -FALL) & (gain_l < -FALL)])
    values = torch.cat([logps[:4], shares.double(), logps[4:]]).mean(1)
    return dict(zip(MEANS, values.tolist(), strict=True)) | {"n": logps.shape[1]}
