"""Configuration of the model and its adapters."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from spo_ray.config.base import ConfigModel, Fraction


class WholeBackbone(ConfigModel):
    """theta is every weight of the backbone."""

    type: Literal["all"] = "all"


class LastLayers(ConfigModel):
    """theta is the backbone's last layers; the rest is frozen."""

    type: Literal["last_layers"]
    count: PositiveInt = 4


class SecondAdapter(ConfigModel):
    """theta is a LoRA adapter of its own beside phi's; the backbone is frozen."""

    type: Literal["adapter"]
    rank: PositiveInt = 32
    alpha: PositiveInt = 64


ThetaConfig = Annotated[WholeBackbone | LastLayers | SecondAdapter, Field(discriminator="type")]


class ModelConfig(ConfigModel):
    """The base model and its adapters."""

    path: str
    """A local directory, or a hub id."""
    chat_template: str | None = None
    """Jinja text that replaces the tokenizer's template."""
    max_template_mismatch: Fraction = 0.05
    """Share of rows for which the template may give other tokens than prompt and completion by themselves; see
    ``spo-ray inspect``."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; auto: FlashAttention 2 where it is installed and computes bfloat16, else PyTorch's."""
    theta: ThetaConfig = WholeBackbone()
    """What SFT trains, and SPO's lower level."""
    lora_rank: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_targets: str | list[str] = "all-linear"
    export_adapter: bool = False
    """Beside a method's merged checkpoint write its backbone, and phi as a PEFT adapter (`backbone`, `adapter`)."""
