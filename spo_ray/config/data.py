"""Sections for data, sampling, teachers and preference pairs."""

import re
from collections.abc import Sequence
from math import ceil
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from spo_ray.config.base import ConfigModel, Fraction, RowSource, Seconds
from spo_ray.config.train import Dtype

MOST_HELD_OUT = 100
"""Most pairs that are held out where no number is set: enough to see a direction, and quickly measured."""


class ToyData(ConfigModel):
    """Word problems that are generated from the seed."""

    type: Literal["toy"] = "toy"
    train_questions: PositiveInt = 500
    """Questions for training."""
    test_questions: PositiveInt = 320
    """Questions held out for evaluation."""


class Location(RowSource):
    """Place of data: files, or a dataset on the Hugging Face hub."""

    test_split: str = "test"
    """Split held out for evaluation."""


class FileData(Location):
    """Fields of data from files or from the Hugging Face hub."""

    contamination_words: Annotated[int, Field(ge=3)] | None = None
    """Contamination check: quarantine training rows (``sft.data``'s too) whose prompt shares so many consecutive words
    with a test prompt; None: no check."""

    @property
    def sources(self) -> "Sequence[Location]":
        """All places that rows are read from."""
        return [self]


class QuestionFields(FileData):
    """Fields of questions whose answers a verifier can compare with responses."""

    question_column: str = "question"
    """Column with the question."""
    answer_column: str = "answer"
    """Column with the correct answer."""
    prompt: str = "{question}"
    """Prompt of the model, in which ``{question}`` stands for the question."""
    train_questions: PositiveInt | None = None
    """Random questions to train on; None: all."""
    test_questions: PositiveInt | None = None
    """Random questions held out for evaluation; None: all of the test split."""
    skip_missing_gold: bool = False
    """Quarantine questions without a usable answer instead of refusing the data."""

    @field_validator("prompt")
    @classmethod
    def _has_the_question(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("must contain {question}")
        return value


class Gsm8kData(QuestionFields):
    """GSM8K, or questions of its form: answers are solutions that end in ``#### N``, or bare numbers."""

    type: Literal["gsm8k"] = "gsm8k"


class QuestionData(QuestionFields):
    """Questions of any other task, graded by a verifier of your own."""

    type: Literal["questions"]
    verifier: str
    """Verifier that grades responses: a name in :mod:`spo_ray.data.verifiers`, or ``package.module:Class``."""


PairColumn = Literal["prompt", "chosen", "rejected", "system", "tools", "completions", "score_chosen", "score_rejected"]


class PairSource(Location):
    """One source of preference pairs."""

    columns: dict[PairColumn, str] = {}
    """Columns of the data that have other names, such as ``prompt: question``."""
    weight: PositiveFloat | None = None
    """Share of this source among several, relative to the others: as many random pairs are taken as the smallest
    allows. None: all of its pairs."""


class PreferenceData(FileData, PairSource):
    """Ready preference pairs, in any format of :mod:`spo_ray.data.preference_formats`."""

    type: Literal["preference"] = "preference"
    more: list[PairSource] = []
    """Further sources, whose pairs are trained on together with those of ``path``."""
    train_pairs: PositiveInt | None = None
    """Random pairs to train on; None: all that are not held out."""
    test_pairs: PositiveInt | Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Pairs held out for evaluation, or their share; None: a tenth of the training split, and at most 100. From the
    training split nearly so many: all pairs of a prompt stay together."""
    held_out: Literal["from_train", "test_split"] = "from_train"
    """Source of the held-out pairs: random prompts of the training split, or rows of the test split."""
    rejected: Literal["worst", "random"] = "worst"
    """Completion that loses against the best one, where a row has several with scores."""

    @property
    def sources(self) -> "Sequence[PairSource]":
        """All sources of pairs."""
        return [self, *self.more]

    def held_out_of(self, pairs: int | None) -> int | None:
        """Return how many of so many pairs are held out; None: unknown, a share of an unknown number."""
        if self.test_pairs is None:
            tenth = None if pairs is None or self.held_out == "test_split" else ceil(pairs / 10)
            return MOST_HELD_OUT if tenth is None else min(MOST_HELD_OUT, tenth)
        if self.test_pairs >= 1:
            return int(self.test_pairs)
        return None if pairs is None else max(1, round(self.test_pairs * pairs))

    @model_validator(mode="after")
    def _weights_agree(self) -> "PreferenceData":
        weights = [source.weight for source in self.sources]
        if any(weights) and (not all(weights) or not self.more):
            raise ValueError("weight is relative: set it for data and for each of data.more, or for none of them")
        return self


DataConfig = Annotated[ToyData | QuestionData | Gsm8kData | PreferenceData, Field(discriminator="type")]


class GenerationConfig(ConfigModel):
    """Fields of all generation of responses."""

    temperature: PositiveFloat = 0.7
    """Sampling temperature."""
    max_tokens: PositiveInt = 256
    """Longest response, in tokens."""
    batch_size: PositiveInt = 256
    """Prompts per engine call; while sampling also per output file, which is repeated if an engine dies. Small batches
    are slow: each waits for its longest response."""


class SamplingConfig(GenerationConfig):
    """Sampling of responses for the SFT set and for the rejected side of pairs."""

    samples: PositiveInt = 8
    """Responses per question, the K of pass@K."""


def _without_secrets(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if re.search("token$|key|password|secret", name):
            raise ValueError(f"{name} may be a secret, and would be written into manifests: set HF_TOKEN instead")
    return value


class EngineConfig(ConfigModel):
    """Generation engines, for sampling and evaluation."""

    type: Literal["auto", "vllm", "transformers"] = "auto"
    """Engine; auto: vLLM where it is installed, else transformers."""
    replicas: PositiveInt = 1
    """Number of engines, each in a Ray actor of its own."""
    max_replicas: PositiveInt | None = None
    """Most engines while sampling: more than ``replicas`` start if there is work and room for them; None: no more."""
    cpus: PositiveFloat = 1.0
    """Logical CPUs per engine."""
    gpus: NonNegativeFloat | None = None
    """GPUs per engine; below 1 a share of one, above 1 tensor parallelism; None: 1 where the cluster has GPUs."""
    dtype: Dtype = "float32"
    """Type of weights and computation."""
    max_model_len: PositiveInt = 1024
    """Longest prompt plus response, in tokens."""
    timeout_s: PositiveFloat = 7200.0
    """Seconds that an engine may take for one batch until it is ended and started again."""
    memory_gib: PositiveFloat = 1.0
    """KV cache of vLLM's CPU build, in GiB. On a GPU vLLM takes its usual share."""
    arguments: dict[str, str | int | float | bool | None] = {}
    """Further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``; they override the other fields."""

    _no_secrets = field_validator("arguments")(_without_secrets)

    @model_validator(mode="after")
    def _range(self) -> "EngineConfig":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below replicas={self.replicas}")
        return self


class EndpointConfig(ConfigModel):
    """Server with OpenAI's chat completions, for teachers and judges."""

    type: Literal["endpoint"]
    url: str
    """Address of the server, up to and including ``/v1``."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the API key, of the process that starts the run; if it is unset, no key is sent."""
    concurrency: PositiveInt = 16
    """Requests at a time."""
    timeout_s: Seconds = 600.0
    """Seconds until a request counts as failed, from its first byte to the last one of the response."""
    retries: Annotated[int, Field(ge=0)] = 5
    """Retries after a failed, rate-limited or timed-out request."""
    request: dict[str, Any] = {}
    """Further fields of every request, such as ``{max_completion_tokens: 4000, temperature: null}``. They replace this
    program's own (null: the field is left out); ``max_completion_tokens`` replaces ``max_tokens`` too."""

    _no_secret_fields = field_validator("request")(_without_secrets)

    @field_validator("url")
    @classmethod
    def _no_secrets(cls, value: str) -> str:
        if "@" in value or "?" in value:
            raise ValueError("a password or key would be written into manifests: use api_key_env")
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # such as a port of 99999
            usable = False
        if not usable or not value.isprintable() or " " in value:
            raise ValueError("no address of a server, such as https://example.com:8000/v1")
        return value


class TeacherModel(ConfigModel):
    """Model that answers questions for which correct responses are missing."""

    model: str
    """Local folder, hub id, or the name of the model at an endpoint."""
    engine: Annotated[EngineConfig | EndpointConfig, Field(discriminator="type")] = EngineConfig(max_model_len=8192)
    """Engine of this run, or an endpoint."""
    sampling: SamplingConfig = SamplingConfig(samples=4, temperature=0.6, max_tokens=4096)
    """Sampling of the teacher's responses."""

    @model_validator(mode="after")
    def _room_for_answers(self) -> "TeacherModel":
        if isinstance(self.engine, EngineConfig) and self.engine.max_model_len <= self.sampling.max_tokens:
            raise ValueError(
                f"engine.max_model_len={self.engine.max_model_len} leaves no room for a prompt beside "
                f"sampling.max_tokens={self.sampling.max_tokens}"
            )
        return self


class SftDataConfig(ConfigModel):
    """Choice of questions and responses for the SFT set."""

    pass_k: PositiveInt = 1
    """The k of the pass@k by which questions are chosen; it is estimated without bias from all samples."""
    max_pass: Fraction | None = 0.5
    """Highest pass@k of the questions that are chosen."""
    quantile: Fraction | None = None
    """Share of the questions that are chosen, instead of ``max_pass``: those with the lowest pass@k, ties included."""
    responses_per_question: PositiveInt = 2
    """Most correct responses to a question."""
    teachers: list[Literal["gold", "samples"] | TeacherModel] = Field(default=["samples", "gold"], min_length=1)
    """Sources of correct responses, in order of preference: the policy's samples, the data's gold solutions, or models,
    which are asked only where responses are still missing."""
    strip: list[str] = [r"^.*?</think>\s*"]
    """Regular expressions that are removed from every response, such as reasoning; ``.`` matches line breaks too."""

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
    """Making of preference pairs from samples, and filters for pairs."""

    per_question: PositiveInt = 1
    """Most pairs of a question."""
    select: Literal["random", "hardest", "nearest", "longest_common_prefix"] = "random"
    """Choice of wrong samples: any; the most probable; the most similar to the chosen response; or the longest common
    beginning with it."""
    dedup: Literal["none", "exact", "normalised", "near"] = "exact"
    """Drop duplicate pairs: none; equal text; equal but for case and white space; or similar text (MinHash)."""
    max_length_ratio: Annotated[float, Field(gt=1.0)] | None = None
    """Largest ratio of the two sides' lengths in characters; None: no limit."""
    max_ches_quantile: Annotated[Fraction, Field(gt=0.0)] | None = None
    """Share of the training pairs that are kept, those with the lowest CHES scores under the reference model; the
    others would lower their chosen response's probability most. None: all."""
    ches: Literal["ches", "ches_per_token"] = "ches"
    """Score that is compared: over sums or over means of a response's hidden embeddings."""
