"""Loading of models from checkpoints: the backbone, the parameters to train, and adapters."""

import re
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available, logging

from spo_ray.config.model import LastLayers, ModelConfig, SecondAdapter, WholeBackbone
from spo_ray.errors import UserError
from spo_ray.model.checkpoint_config import generation_settings, model_config
from spo_ray.model.checkpoint_files import check_finite, load_weights
from spo_ray.model.fsdp import decoder_layers

logging.disable_progress_bar()


PHI, THETA = "default", "theta"
"""PEFT's names of the adapters; ``theta`` exists only if theta is an adapter."""


def load_model(
    path: str | Path, dtype: str = "float32", attention: str = "auto", *, compute: str | None = None
) -> PreTrainedModel:
    """Load a causal language model from a directory or the hub, from safetensors only.

    Args:
        path: the checkpoint.
        dtype: type of the parameters.
        attention: ``auto``, or an implementation of transformers, see :class:`spo_ray.config.model.ModelConfig`.
        compute: type of forward passes, if it differs from ``dtype``.

    Raises:
        UserError: the attention implementation is not installed or does not support this model, or the weights are
            incomplete, damaged or not finite.
    """
    config = model_config(path)
    implementation = _attention(config, attention, compute or dtype)
    model = load_weights(path, config=config, dtype=getattr(torch, dtype), attn_implementation=implementation)
    check_finite(path)
    return model


def build_policy(
    path: str | Path,
    config: ModelConfig,
    seed: int,
    *,
    with_phi: bool,
    dtype: str = "float32",
    compute: str | None = None,
    device: Literal["cpu", "meta"] = "cpu",
) -> nn.Module:
    """Load the backbone of a checkpoint, with theta as configured and phi as LoRA adapters.

    New adapters do not change the backbone's outputs. Parameters in neither theta nor phi are frozen. ``last_layers``
    trains whole decoder layers, without final norm and embeddings. Adapters depend on the seed, and phi does not depend
    on the kind of theta. Their dropout is 0, because gradients of two passes are subtracted.

    Args:
        path: the checkpoint; it may differ from the configuration's, since methods may start from SFT's.
        config: theta, adapters and attention.
        seed: seed of the adapters' initial values.
        with_phi: add phi; SFT trains theta alone.
        dtype: type of the parameters.
        compute: type of forward passes, if it differs from ``dtype``.
        device: ``meta`` builds the same structure with the same names without reading weights.

    Raises:
        UserError: more last layers than the model has, adapters on tied embeddings or on no module, or an error of
            :func:`load_model`.
    """
    read = _empty if device == "meta" else load_model
    base = read(path, dtype, config.attention, compute=compute)
    for parameter in base.parameters():
        parameter.requires_grad_(isinstance(config.theta, WholeBackbone))
    for parameter in _last_layers(base, config.theta) if isinstance(config.theta, LastLayers) else []:
        parameter.requires_grad_(True)
    frozen = {id(parameter) for parameter in base.parameters() if not parameter.requires_grad}
    model = _with_adapters(base, config, seed, with_phi)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) not in frozen)  # PEFT freezes the backbone
        if dtype == "float64" and ".lora_" in name:  # PEFT gives adapters the backbone's type, but not on meta
            parameter.data = parameter.data.double()
    return model


def parameter_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of theta's and of phi's trainable parameters; frozen ones are in neither."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    phi = [name for name in names if _PHI_NAME.search(name)]
    others = set(phi)
    return [name for name in names if name not in others], phi


_PHI_NAME = re.compile(rf"\.lora_\w+\.{PHI}(\.|$)")


def _empty(path: str | Path, dtype: str, attention: str, *, compute: str | None) -> PreTrainedModel:
    """Build the model of a checkpoint's configuration on the meta device."""
    config = model_config(path)
    implementation = _attention(config, attention, compute or dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=implementation
        )
    model.generation_config = generation_settings(path) or model.generation_config
    return model


def _attention(config: Any, choice: str, compute: str) -> str | None:
    """Return the name of the implementation in transformers; None: PyTorch's if the model supports it, else eager."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    flash = is_flash_attn_2_available()
    if choice == "auto":
        supported = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_supports_flash_attn", False)
        if flash and supported and compute == "bfloat16":
            return "flash_attention_2"
        return "eager" if capped else None
    if choice == "flash_attention_2" and not flash:
        raise UserError(
            "model.attention=flash_attention_2 needs the package flash-attn and a GPU; auto works without them"
        )
    if choice == "flash_attention_2" and compute != "bfloat16":
        raise UserError(f"model.attention=flash_attention_2 computes in bfloat16 only, not in {compute}")
    if choice == "sdpa" and capped:
        raise UserError(
            f"model.attention=sdpa leaves out the soft cap of {config.model_type}'s attention scores, "
            "which makes it another model: use auto or eager"
        )
    return choice


def _last_layers(model: nn.Module, theta: LastLayers) -> list[nn.Parameter]:
    layers = decoder_layers(model)
    if theta.count > len(layers):
        raise UserError(f"model.theta.count={theta.count}, but the model has {len(layers)} layers")
    return [parameter for layer in layers[-theta.count :] for parameter in layer.parameters()]


def _with_adapters(model: PreTrainedModel, config: ModelConfig, seed: int, with_phi: bool) -> nn.Module:
    """Wrap a model by PEFT with one or two active adapters; return the model itself if there are none."""
    sizes: dict[str, tuple[int, int]] = {}
    if with_phi:
        sizes[PHI] = (config.lora_rank, config.lora_alpha)
    if isinstance(config.theta, SecondAdapter):
        sizes[THETA] = (config.theta.rank, config.theta.alpha)
    if not sizes:
        return model
    from peft import LoraConfig, get_peft_model  # takes seconds to import, and only training needs it

    def lora(rank: int, alpha: int) -> LoraConfig:
        targets = config.lora_targets
        return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")

    (first, size), *others = sizes.items()
    empty = model.device.type == "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, lora(*size), first, low_cpu_mem_usage=empty)
            for name, size in others:
                wrapped.add_adapter(name, lora(*size), low_cpu_mem_usage=empty)
        except ValueError as error:
            raise UserError(f"model.lora_targets={config.lora_targets!r}: {error}") from error
    cast(Any, wrapped.base_model).set_adapter(list(sizes))  # PeftModel's own takes a single name
    _refuse_tied_targets(wrapped, config)
    return wrapped


def _refuse_tied_targets(wrapped: Any, config: ModelConfig) -> None:
    """Refuse an adapter on one use of a tied embedding, since it can't be merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = wrapped.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if base.config.tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise UserError(f"model.lora_targets={config.lora_targets!r} includes an embedding that is tied: leave it out")
