"""Generation with a Hugging Face model from prompts of different lengths."""

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
    """Return the generated token ids of each prompt, including the end token if there is one.

    ``options`` are those of transformers' ``generate``. The checkpoint's own generation settings are ignored.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.pad_id] * (width - len(p)) + [*p] for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    with _default_settings(model):
        found = model.generate(input_ids=ids, attention_mask=mask, **options)
    answers = []
    for tokens in found[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(tokens) if token in chat.stop_ids), len(tokens))
        answers.append(tokens[:end])
    return answers


@contextmanager
def _default_settings(model: Any) -> Generator[None]:
    """Replace the model's generation settings by the defaults in the context; restore them afterwards for the export.

    Otherwise they would apply wherever a call sets nothing, such as a nucleus or a repetition penalty.
    """
    base = base_of(model)
    settings, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = settings
