"""The actor that holds the reference model."""

import torch

from spo_ray.core.logps import completion_logps
from spo_ray.model.collate import collate, rows_at_once
from spo_ray.model.load import load_model
from spo_ray.model.tokenise import ChatTokenizer
from spo_ray.shards import Mapped, Row


class Scorer:
    """A mapper that holds the reference model."""

    def __init__(self, model: str, precision: str, max_length: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pad_id = ChatTokenizer.load(model).pad_id
        self.precision, self.size = precision, rows_at_once(max_length)
        self.model = load_model(model).to(self.device).eval()

    def __call__(self, table: list[Row]) -> Mapped:
        columns = {f"ref_{side}_logps": self.score(table, f"{side}_ids") for side in ("chosen", "rejected")}
        return [row | {key: values[i] for key, values in columns.items()} for i, row in enumerate(table)], []

    @torch.inference_mode()
    def score(self, table: list[Row], side: str) -> list[float]:
        """Log-probabilities in the table's order; batches are made of rows of similar length."""
        order = sorted(range(len(table)), key=lambda i: len(table[i]["prompt_ids"]) + len(table[i][side]))
        values = [0.0] * len(table)
        for start in range(0, len(order), self.size):
            indices = order[start : start + self.size]
            batch = collate([(table[i]["prompt_ids"], table[i][side]) for i in indices], self.pad_id)
            batch = {key: value.to(self.device) for key, value in batch.items()}
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
                logps, _ = completion_logps(self.model, batch["input_ids"], batch["labels"], batch["attention_mask"])
            for i, value in zip(indices, logps.tolist(), strict=True):
                values[i] = value
        return values
