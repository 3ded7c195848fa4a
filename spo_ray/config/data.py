"""The sections of the configuration that say what data a run has, and how samples and pairs are made from it."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from spo_ray.config.base import ConfigModel, Fraction
from spo_ray.config.train import Dtype


class ToyData(ConfigModel):
    """The embedded word problems, generated from the seed."""

    type: Literal["toy"] = "toy"
    train_questions: PositiveInt = 500
    test_questions: PositiveInt = 320


class FileData(ConfigModel):
    """Rows from files or from the hub."""

    path: Path
    """A folder with ``SPLIT.jsonl`` or Parquet files, one such file, or a dataset's name on the hub."""
    subset: str | None = None
    """A hub dataset's configuration, such as GSM8K's ``main``."""
    revision: str = "main"
    """A hub dataset's branch, tag or commit: name a commit for a result that can be repeated."""
    train_split: str = "train"
    test_split: str = "test"
    contamination_words: Annotated[int, Field(ge=3)] | None = None
    """Training rows whose prompt shares so many words in a row with a test prompt are quarantined; None: no check."""


class QuestionFields(FileData):
    """Questions with answers that a verifier can compare responses with."""

    question_column: str = "question"
    answer_column: str = "answer"
    prompt: str = "{question}"
    """What the model is asked; ``{question}`` stands for the question."""
    train_questions: PositiveInt | None = None
    """Random questions to keep; None: all."""
    test_questions: PositiveInt | None = None
    skip_missing_gold: bool = False
    """Quarantine questions without a usable answer instead of refusing the file."""

    @field_validator("prompt")
    @classmethod
    def _has_the_question(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("must contain {question}")
        return value


class Gsm8kData(QuestionFields):
    """GSM8K: answers are solutions that end in ``#### N``, or bare numbers."""

    type: Literal["gsm8k"] = "gsm8k"


class QuestionData(QuestionFields):
    """Any other task."""

    type: Literal["questions"]
    verifier: str
    """What is correct: a name in :mod:`spo_ray.data.verifiers`, or ``package.module:Class``."""


class PreferenceData(FileData):
    """Ready preference pairs, in any of the formats of :mod:`spo_ray.data.preference_formats`."""

    type: Literal["preference"] = "preference"
    train_pairs: PositiveInt | None = None
    """Random pairs to train on; None: all that are not held out."""
    test_pairs: PositiveInt = 100
    """Pairs held out for evaluation; out of the training split so many, or as near as whole prompts come."""
    held_out: Literal["from_train", "test_split"] = "from_train"
    """Where they come from: random prompts of the training split with all their pairs, or rows of the test split."""
    rejected: Literal["worst", "random"] = "worst"
    """Of rows with several scored completions: which one loses against the best."""


DataConfig = Annotated[ToyData | QuestionData | Gsm8kData | PreferenceData, Field(discriminator="type")]


class GenerationConfig(ConfigModel):
    """How a model's responses are generated."""

    temperature: PositiveFloat = 0.7
    """Sampling temperature."""
    max_tokens: PositiveInt = 256
    """Longest response, in tokens."""
    batch_size: PositiveInt = 256
    """Prompts per engine call; of sampling also per output file, which is made again if an engine dies. An engine waits
    for the last answers of a batch, so small batches are slow."""


class SamplingConfig(GenerationConfig):
    """Sampling a model, for the SFT set and for the rejected responses."""

    samples: PositiveInt = 8
    """Responses per question, the K of pass@K."""


class EngineConfig(ConfigModel):
    """The generation engines, for sampling and evaluation."""

    type: Literal["auto", "vllm", "transformers"] = "auto"
    replicas: PositiveInt = 1
    """Engines, each an actor of its own."""
    max_replicas: PositiveInt | None = None
    """For sampling, engines that may be added while there is work and room for them; None: no more."""
    cpus: PositiveFloat = 1.0
    """Logical CPUs per engine."""
    gpus: NonNegativeFloat | None = None
    """GPUs per engine; None: 1 where the cluster has GPUs. Below 1 it is a share of one, above 1 tensor parallelism."""
    dtype: Dtype = "float32"
    max_model_len: PositiveInt = 1024
    """Prompt plus response, in tokens."""
    memory_gib: PositiveFloat = 1.0
    """KV-cache of vLLM's CPU build; on a GPU vLLM takes its usual share."""
    arguments: dict[str, str | int | float | bool | None] = {}
    """Further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``; they replace what is set otherwise."""

    @field_validator("arguments")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if re.search("token$|key|password|secret", name):
                raise ValueError(f"{name} may be a secret, and would be written into manifests: set HF_TOKEN instead")
        return value

    @model_validator(mode="after")
    def _range(self) -> "EngineConfig":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below replicas={self.replicas}")
        return self


class EndpointConfig(ConfigModel):
    """A server with OpenAI's chat completions, for a teacher."""

    type: Literal["endpoint"]
    url: str
    """Up to and including ``/v1``."""
    api_key_env: str = "OPENAI_API_KEY"
    """The variable that holds the key, in the environment of the process that starts the run; unset: none is sent."""
    concurrency: PositiveInt = 16
    """Requests under way at a time."""
    timeout_s: PositiveFloat = 600.0
    retries: Annotated[int, Field(ge=0)] = 5
    """Of a request that failed, was refused for its rate, or timed out."""

    @field_validator("url")
    @classmethod
    def _no_secrets(cls, value: str) -> str:
        if "@" in value or "?" in value:
            raise ValueError("a password or key would be written into manifests: use api_key_env")
        return value


class TeacherModel(ConfigModel):
    """A model that answers the questions which the policy fails."""

    model: str
    """A local directory, a hub id, or the name of the model at an endpoint."""
    engine: Annotated[EngineConfig | EndpointConfig, Field(discriminator="type")] = EngineConfig(max_model_len=8192)
    sampling: SamplingConfig = SamplingConfig(samples=4, temperature=0.6, max_tokens=4096)

    @model_validator(mode="after")
    def _room_for_answers(self) -> "TeacherModel":
        if isinstance(self.engine, EngineConfig) and self.engine.max_model_len <= self.sampling.max_tokens:
            raise ValueError(
                f"engine.max_model_len={self.engine.max_model_len} leaves no room for a prompt beside "
                f"sampling.max_tokens={self.sampling.max_tokens}"
            )
        return self


class SftDataConfig(ConfigModel):
    """Which questions and responses make the SFT set."""

    pass_k: PositiveInt = 1
    """The k of the pass@k that chooses questions (unbiased estimate from all samples)."""
    max_pass: Fraction | None = 0.5
    """Questions with a pass@k of at most this are chosen."""
    quantile: Fraction | None = None
    """Instead of ``max_pass``: this share of the questions, those with the lowest pass@k, and equals of the last."""
    responses_per_question: PositiveInt = 2
    teachers: list[Literal["gold", "samples"] | TeacherModel] = Field(default=["samples", "gold"], min_length=1)
    """Where correct responses come from, in order of preference. Models are asked where responses still lack."""
    strip: list[str] = [r"^.*?</think>\s*"]
    """Regular expressions (``.`` matches line breaks) that are removed from every response."""

    @field_validator("strip")
    @classmethod
    def _compile(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _one_choice(self) -> "SftDataConfig":
        if (self.max_pass is None) == (self.quantile is None):
            raise ValueError("set one of max_pass and quantile, and the other to null")
        models = [isinstance(teacher, TeacherModel) for teacher in self.teachers]
        if "samples" in self.teachers and any(models[: self.teachers.index("samples")]):
            raise ValueError("the teacher 'samples' must stand before models")
        return self


class PairsConfig(ConfigModel):
    """How preference pairs are made from samples, and which are kept."""

    per_question: PositiveInt = 1
    select: Literal["random", "hardest", "nearest", "longest_common_prefix"] = "random"
    """Which wrong samples: any; the most probable ones; those most like the chosen response; or that begin like it."""
    dedup: Literal["none", "exact", "normalised", "near"] = "exact"
    """Drop pairs that were there before: to the letter; but for case, punctuation and spaces; or nearly (MinHash)."""
    max_length_ratio: Annotated[float, Field(gt=1.0)] | None = None
    """Longest allowed ratio of the two sides' lengths in characters."""
