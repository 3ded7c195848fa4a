"""Answers of a Hugging Face model to prompts of different lengths."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from spo_ray.core.lm_head import base_of
from spo_ray.model.tokenizer import ChatTokenizer


def generate(
    model: Any, chat: ChatTokenizer, prompts: Sequence[Sequence[int]], device: torch.device | str, **options: Any
) -> list[list[int]]:
    """Token ids, each with its end token if it has one; ``options`` are those of transformers' ``generate``.

    The checkpoint's own generation settings count for nothing.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.pad_id] * (width - len(p)) + [*p] for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    with _own_settings_alone(model):
        found = model.generate(input_ids=ids, attention_mask=mask, **options)
    answers = []
    for tokens in found[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(tokens) if token in chat.stop_ids), len(tokens))
        answers.append(tokens[:end])
    return answers


@contextmanager
def _own_settings_alone(model: Any) -> Generator[None]:
    """Without the model's settings, which fill whatever a call leaves open, such as a nucleus or a repetition penalty.

    They are back afterwards, for the export.
    """
    base = base_of(model)
    settings, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = settings
