"""Answers of a Hugging Face model to prompts of different lengths."""

from collections.abc import Sequence
from typing import Any

import torch

from spo_ray.model.tokenise import ChatTokenizer


def generate(
    model: Any, chat: ChatTokenizer, prompts: Sequence[Sequence[int]], device: torch.device | str, **options: Any
) -> list[list[int]]:
    """Token ids, each with its end token if it has one; ``options`` are those of transformers' ``generate``."""
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.pad_id] * (width - len(p)) + [*p] for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    answers = []
    for tokens in model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(tokens) if token in chat.stop_ids), len(tokens))
        answers.append(tokens[:end])
    return answers
