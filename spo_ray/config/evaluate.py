"""The section of the configuration that says what checkpoints are judged by."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from spo_ray.config.base import ConfigModel, Fraction
from spo_ray.config.data import EndpointConfig, EngineConfig, GenerationConfig

LM_EVAL = "lm_eval:"
SUITES = ("accuracy", "health", "alpaca_eval")


class AnnotatorConfig(ConfigModel):
    """A judge of two outputs: any chat model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """What its results are called."""
    model: str
    """A local directory, a hub id, or the name of the model at an endpoint."""
    engine: Annotated[EngineConfig | EndpointConfig, Field(discriminator="type")]
    template: Path | None = None
    """A prompt with ``{instruction}``, ``{output_1}`` and ``{output_2}``, in turns between ``<|im_start|>ROLE`` and
    ``<|im_end|>``, or plain text; None: AlpacaEval's own."""
    identifiers: tuple[str, str] = ("m", "M")
    """What the prompt calls the first and the second output, and asks for."""
    verdict: Literal["auto", "weighted", "discrete"] = "auto"
    """``weighted``: the probabilities of the identifiers; ``discrete``: the one that is named; ``auto``: weighted where
    log-probabilities are given."""
    orders: Literal["random", "both"] = "random"
    """The model's output first or second by chance, or both ways with the mean of the two."""
    max_tokens: PositiveInt = 1
    """Of an answer; more than 1 for a prompt that asks for reasons, whose last line names the better output."""
    temperature: NonNegativeFloat = 0.0
    requests_per_minute: PositiveFloat | None = None
    """To an endpoint; None: as fast as ``engine.concurrency`` allows."""
    price_per_million: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    """Of prompt and answer tokens, in any currency, for the cost in the manifest."""

    @model_validator(mode="after")
    def _one_token_is_enough(self) -> "AnnotatorConfig":
        if self.identifiers[0] == self.identifiers[1]:
            raise ValueError("the two identifiers must differ")
        if self.verdict == "weighted" and self.max_tokens > 1:
            raise ValueError("verdict=weighted reads the first token: set max_tokens=1, or verdict=discrete")
        if self.requests_per_minute is not None and not isinstance(self.engine, EndpointConfig):
            raise ValueError("requests_per_minute is for endpoints: this engine is a local one")
        if isinstance(self.engine, EngineConfig) and (self.engine.replicas > 1 or self.engine.max_replicas):
            raise ValueError("a local judge has one engine: set engine.replicas=1, and no max_replicas")
        return self


class AlpacaConfig(ConfigModel):
    """Suite ``alpaca_eval``: outputs against a baseline's, judged by other models."""

    instructions: Path = Path("tatsu-lab/alpaca_eval")
    """JSON or JSONL with ``instruction``, the baseline's ``output`` and ``generator``; or the dataset on the hub."""
    limit: PositiveInt | None = None
    """The first so many instructions; None: all."""
    temperature: NonNegativeFloat = 0.7
    max_tokens: PositiveInt = 2048
    annotators: list[AnnotatorConfig] = Field(min_length=1)
    max_unjudged: Fraction = 0.05
    """Share of instructions that may stay without a verdict; with more, the stage fails. The next try asks again where
    requests failed."""
    length_control: Literal["minimal", "v1"] = "minimal"
    """Formula of the length-controlled win rate; v1, the leaderboard's, needs a table from the hub, and is for
    AlpacaEval's own instructions."""

    @field_validator("annotators")
    @classmethod
    def _names_differ(cls, value: list[AnnotatorConfig]) -> list[AnnotatorConfig]:
        if len({annotator.name for annotator in value}) < len(value):
            raise ValueError("annotators must have different names")
        return value


class LmEvalConfig(ConfigModel):
    """Suites ``lm_eval:TASK``: tasks of lm-evaluation-harness, with this run's engine and chat template."""

    include_path: Path | None = None
    """A folder with task definitions of your own."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """None: as the task says."""
    limit: PositiveInt | None = None
    """Documents per task; None: all."""


class EvalConfig(GenerationConfig):
    """What checkpoints are judged by, on data that training has not seen."""

    suites: list[str] | None = None
    """``accuracy`` (questions alone), ``health``, ``alpaca_eval``, ``lm_eval:TASK``; None: the first two where they
    apply."""
    while_training: bool = True
    """Evaluate the base and the SFT model beside later stages, where the cluster has room for an engine more."""
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """One sampled answer per question and seed."""
    health_prompts: PositiveInt = 128
    """Random held-out prompts that suite ``health`` asks, once greedily and once at temperature 1."""
    alpaca: AlpacaConfig | None = None
    lm_eval: LmEvalConfig = LmEvalConfig()

    @field_validator("suites")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        for name in value or []:
            if name not in SUITES and not re.fullmatch(rf"{LM_EVAL}[\w.-]+", name):
                raise ValueError(f"no suite {name!r}: there are {', '.join(SUITES)} and {LM_EVAL}TASK")
        if value and len(set(value)) < len(value):
            raise ValueError("a suite stands there twice")
        return value

    @field_validator("seeds")
    @classmethod
    def _differ(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed stands there twice: its answers would be the same")
        return value

    @model_validator(mode="after")
    def _has_annotators(self) -> "EvalConfig":
        if self.alpaca is None and "alpaca_eval" in (self.suites or []):
            raise ValueError("suite alpaca_eval needs the section eval.alpaca, with annotators")
        return self

    def chosen(self, data: Any) -> list[str]:
        """The suites' names, for a run on this kind of data."""
        if self.suites is not None:
            return self.suites
        return ["health"] if data.type == "preference" else ["accuracy", "health"]
