"""Models and adapters."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from spo_ray.config import ModelConfig

logging.disable_progress_bar()


def load_model(path: str | Path, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model from a directory or the hub, safetensors only."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), use_safetensors=True)


def add_adapters(model: PreTrainedModel, config: ModelConfig, seed: int) -> nn.Module:
    """Wrap with LoRA adapters phi, the same for the same seed; backbone theta and adapters are both trainable.

    Dropout is 0: differences of gradients between two passes of a step must not be noise.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds to import, and only training needs it

    torch.manual_seed(seed)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=config.lora_targets,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, lora)
    for parameter in wrapped.parameters():
        parameter.requires_grad_(True)
    return wrapped


def parameter_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """(names of theta's parameters, names of phi's)."""
    names = [name for name, _ in model.named_parameters()]
    return [n for n in names if ".lora_" not in n], [n for n in names if ".lora_" in n]
