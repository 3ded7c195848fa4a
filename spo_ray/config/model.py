"""Section for the model and its adapters."""

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from spo_ray.config.base import ConfigModel, Fraction


class WholeBackbone(ConfigModel):
    """Train every weight of the backbone as theta."""

    type: Literal["all"] = "all"


class LastLayers(ConfigModel):
    """Train the backbone's last layers as theta; the rest is frozen."""

    type: Literal["last_layers"]
    count: PositiveInt = 4
    """Number of layers that are trained."""


class SecondAdapter(ConfigModel):
    """Train a LoRA adapter as theta, beside phi's; the backbone is frozen."""

    type: Literal["adapter"]
    rank: PositiveInt = 32
    """LoRA rank of theta's adapter."""
    alpha: PositiveInt = 64
    """LoRA alpha of theta's adapter; its scale is alpha over rank."""


ThetaConfig = Annotated[WholeBackbone | LastLayers | SecondAdapter, Field(discriminator="type")]


class TemplateConfig(ConfigModel):
    """Chat template and what it is given."""

    chat_template: str | None = None
    """Jinja text that replaces the tokenizer's chat template."""
    template_arguments: dict[str, str | int | float | bool | list[str] | None] = {}
    """Arguments of the chat template, such as ``enable_thinking: false``; ``spo-ray inspect`` says which are needed."""
    template_date: datetime.date | None = None
    """Date that templates take for today's; None: the date of the run's first start, which is kept in the run."""
    answer_prefix: str | None = None
    """Text behind templated prompts, with which every answer begins, such as ``<|channel|>final<|message|>``. None: no
    text, and a template that puts one between prompt and answer is refused."""

    @property
    def template_settings(self) -> dict[str, Any]:
        """The fields of this class alone as JSON, for the identity of stages: prompts depend on them."""
        return self.model_dump(mode="json", include=set(TemplateConfig.model_fields))


OWN_TEMPLATE = TemplateConfig()
"""A tokenizer's chat template as it is."""


class ModelConfig(TemplateConfig):
    """Base model and its LoRA adapters."""

    path: str
    """Local folder or hub id of an instruction-tuned model, or local folder of a PEFT adapter that names its model."""
    adapter: Path | None = None
    """Folder of a PEFT adapter that is merged into the model before the job; None: none, or ``path`` itself."""
    max_template_mismatch: Fraction = 0.05
    """Largest share of rows whose tokens are changed by the chat template; ``spo-ray inspect`` shows them."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; auto: FlashAttention 2 for bfloat16 where it is installed, else PyTorch's."""
    theta: ThetaConfig = WholeBackbone()
    """Backbone parameters theta, which SFT and SPO's lower level train."""
    lora_rank: PositiveInt = 8
    """LoRA rank of phi's adapter."""
    lora_alpha: PositiveInt = 16
    """LoRA alpha of phi's adapter; its scale is alpha over rank."""
    lora_targets: str | list[str] = "all-linear"
    """Modules with adapters, as PEFT's ``target_modules``."""
    export_adapter: bool = False
    """Write a method's backbone and phi as a PEFT adapter too (folders ``backbone``, ``adapter``), not merged alone."""
