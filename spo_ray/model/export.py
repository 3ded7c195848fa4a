"""Exports that other programs load: merged Hugging Face checkpoints with a probe of their own log-probabilities."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spo_ray.core.logps import completion_logps
from spo_ray.model.collate import collate
from spo_ray.model.tokenise import ChatTokenizer

PROBE = "spo_probe.json"


def export_merged(model: nn.Module, chat: ChatTokenizer, path: Path, probe: tuple[list[int], list[int]]) -> None:
    """Merge adapters into the backbone and save model and tokenizer; the model can't be trained further afterwards.

    ``probe`` is (prompt ids, completion ids): its log-probability is stored beside the weights, so that whatever loads
    them can be compared with the trainer.
    """
    model.eval()
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in collate([probe], chat.pad_id).items()}
    with torch.inference_mode():
        logps, _ = completion_logps(model, batch["input_ids"], batch["labels"], batch["attention_mask"])
    saved: Any = model
    if hasattr(saved, "merge_and_unload"):  # PEFT's wrapper
        saved = saved.merge_and_unload()
    saved.save_pretrained(path)
    chat.tokenizer.save_pretrained(path)
    record = {"prompt_ids": probe[0], "completion_ids": probe[1], "logp": logps.item()}
    (path / PROBE).write_text(json.dumps(record))


def read_probe(path: str | Path) -> dict[str, Any] | None:
    """The probe of a checkpoint exported here; None for any other model."""
    file = Path(path) / PROBE
    return json.loads(file.read_text()) if file.is_file() else None
