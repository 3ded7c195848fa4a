"""Conversion of token lists to right-padded tensor batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spo_ray.core.logps import IGNORE

TokenRow = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, completion ids)."""
SCORED_ROWS, SCORED_TOKENS = 32, 8192
"""Largest number of rows, and of tokens, in one pass without gradients."""


def rows_at_once(max_length: int) -> int:
    """Return the number of rows of up to ``max_length`` tokens for one pass without gradients."""
    return max(1, min(SCORED_ROWS, SCORED_TOKENS // max_length))


def collate(rows: Sequence[TokenRow], pad_id: int) -> dict[str, Tensor]:
    """Convert (prompt ids, completion ids) rows to ``input_ids``, ``labels``, ``attention_mask``, [B, T] int64."""
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), IGNORE)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[i, :end] = torch.tensor([*prompt, *completion])
        labels[i, len(prompt) : end] = torch.tensor([*completion])
        attention_mask[i, :end] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def collate_pairs(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Convert rows of :class:`spo_ray.runtime.schema.TokenisedPair` to the batch of ``spo_gradients``.

    Chosen and rejected are padded separately; reference logps and gaps of scores are float64 [B], absent if a row has
    none.
    """
    batch = {}
    for side in ("chosen", "rejected"):
        tensors = collate([(row["prompt_ids"], row[f"{side}_ids"]) for row in rows], pad_id)
        batch |= {f"{side}_{key}": value for key, value in tensors.items()}
        if f"ref_{side}_logps" in rows[0]:
            values = [row[f"ref_{side}_logps"] for row in rows]
            batch[f"ref_{side}_logps"] = torch.tensor(values, dtype=torch.float64)
    gaps = [row.get("score_gap") for row in rows]
    if None not in gaps:
        batch["score_gaps"] = torch.tensor(gaps, dtype=torch.float64)
    return batch
