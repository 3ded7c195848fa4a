"""Section for the evaluation of checkpoints."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from spo_ray.config.base import ConfigModel, Fraction, Seed
from spo_ray.config.data import EndpointConfig, EngineConfig, GenerationConfig

LM_EVAL = "lm_eval:"
SUITES = ("accuracy", "health", "alpaca_eval")


class AnnotatorConfig(ConfigModel):
    """Judge that compares two outputs: any chat model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the judge in results."""
    model: str
    """Local folder, hub id, or the name of the model at an endpoint."""
    engine: Annotated[EngineConfig | EndpointConfig, Field(discriminator="type")]
    """Engine of this run, or an endpoint."""
    template: Path | None = None
    """File with a prompt that has ``{instruction}``, ``{output_1}`` and ``{output_2}``: plain text, or turns between
    ``<|im_start|>ROLE`` and ``<|im_end|>``; None: AlpacaEval's own."""
    identifiers: tuple[str, str] = ("m", "M")
    """Names of the first and the second output in the prompt, of which the judge answers one."""
    verdict: Literal["auto", "weighted", "discrete"] = "auto"
    """Reading of the answer: ``weighted`` by the probabilities of the identifiers; ``discrete`` the one that is named;
    ``auto`` weighted where log-probabilities are given."""
    orders: Literal["random", "both"] = "random"
    """Position of the model's output: at random first or second, or both ways with the mean of the two verdicts."""
    max_tokens: PositiveInt = 1
    """Longest answer, in tokens; more than 1 for a prompt that asks for reasons, with the verdict in the last line."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0: greedy."""
    requests_per_minute: PositiveFloat | None = None
    """Most requests per minute to an endpoint; None: limited by ``engine.concurrency`` alone."""
    price_per_million: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    """Price of a million prompt tokens and of a million answer tokens, for the cost in the manifest."""

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
    """Suite ``alpaca_eval``: judges compare outputs with those of a baseline."""

    instructions: Path = Path("tatsu-lab/alpaca_eval")
    """JSON or JSONL file with ``instruction`` and the baseline's ``output`` and ``generator``, or a hub dataset."""
    limit: PositiveInt | None = None
    """Number of instructions, from the first on; None: all."""
    temperature: NonNegativeFloat = 0.7
    """Sampling temperature of the outputs; 0: greedy."""
    max_tokens: PositiveInt = 2048
    """Longest output, in tokens."""
    annotators: list[AnnotatorConfig] = Field(min_length=1)
    """Judges, each with win rates of its own."""
    max_unjudged: Fraction = 0.05
    """Largest share of instructions without a verdict; with more the stage fails, and a rerun asks for these again."""
    length_control: Literal["minimal", "v1"] = "minimal"
    """Formula of the length-controlled win rate. v1 is the leaderboard's; it needs a table from the hub, and
    AlpacaEval's own instructions."""

    @field_validator("annotators")
    @classmethod
    def _names_differ(cls, value: list[AnnotatorConfig]) -> list[AnnotatorConfig]:
        if len({annotator.name for annotator in value}) < len(value):
            raise ValueError("annotators must have different names")
        return value


class LmEvalConfig(ConfigModel):
    """Suites ``lm_eval:TASK``: tasks of lm-evaluation-harness, on this run's engine and with its chat template."""

    include_path: Path | None = None
    """Folder with task definitions of your own."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in the prompt; None: the task's own number."""
    limit: PositiveInt | None = None
    """Documents per task, from the first on; None: all."""


class EvalConfig(GenerationConfig):
    """Evaluation of checkpoints, on data that training has not seen."""

    suites: list[str] | None = None
    """Suites: ``accuracy`` (data with questions only), ``health``, ``alpaca_eval``, ``lm_eval:TASK``; None: health, and
    accuracy where there are questions."""
    while_training: bool = True
    """Evaluate the checkpoints before preference training while later stages run, where the cluster has room for one
    more engine."""
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1)
    """Seeds of the sampled answers: each question is answered once with each."""
    health_prompts: PositiveInt = 128
    """Random held-out prompts of suite ``health``, answered greedily and once at temperature 1."""
    alpaca: AlpacaConfig | None = None
    """Settings of suite ``alpaca_eval``, which needs them."""
    lm_eval: LmEvalConfig = LmEvalConfig()

    @field_validator("suites")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        for name in value or []:
            if name not in SUITES and not re.fullmatch(rf"{LM_EVAL}[\w.-]+", name):
                raise ValueError(f"no suite {name!r}: there are {', '.join(SUITES)} and {LM_EVAL}TASK")
        if value and len(set(value)) < len(value):
            raise ValueError("a suite is listed twice")
        return value

    @field_validator("seeds")
    @classmethod
    def _differ(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed is listed twice: its answers would be the same")
        return value

    @model_validator(mode="after")
    def _has_annotators(self) -> "EvalConfig":
        if self.alpaca is None and "alpaca_eval" in (self.suites or []):
            raise ValueError("suite alpaca_eval needs the section eval.alpaca, with annotators")
        return self

    def chosen(self, data: Any) -> list[str]:
        """Return the suites' names for a run on this kind of data."""
        if self.suites is not None:
            return self.suites
        return ["health"] if data.type == "preference" else ["accuracy", "health"]
