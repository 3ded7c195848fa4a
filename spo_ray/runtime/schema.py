"""Rows that pass from one stage to the next, as typed dictionaries and as Parquet columns.

A row of samples is one question with all its responses in lists, so that pass@K, the choice of questions and the
pairing work on single rows and need no shuffle. Log-probabilities are in nats, summed over the tokens of the text.
"""

from typing import Any, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import pyarrow as pa


class Prompt(TypedDict):
    """A question with its gold answer."""

    id: str
    prompt: str
    gold: str  # the reference solution, which ends in the gold answer


class SftQuestion(Prompt):
    """A question chosen for SFT, with its correct responses."""

    responses: list[str]
    response_sources: list[str]  # "gold", or "STAGE:INDEX" of the sample


class Samples(SftQuestion):
    """A question with a model's samples; ``responses`` is empty until the SFT set exists."""

    prompt_ids: list[int]  # the prompt in the chat template; empty if an endpoint applied it
    refused: str | None  # why a teacher could not be asked; None if it was
    seed: int | None  # seed of all samples of the row; None if there are none
    samples: list[str]
    sample_logps: list[float | None]  # at temperature 1, end token included; None if unknown
    sample_tokens: list[int]
    finished: list[bool]  # True if the sample ended with the end-of-turn token


class Scored(Samples):
    """Samples with their grades."""

    extracted: list[str | None]  # the answer found in each sample; None if there is none
    correct: list[bool]
    strict: list[bool]  # True if the sample is correct and in the form that the task asks for


class Turn(TypedDict):
    """A chat message."""

    role: str
    content: str
    # Further fields that chat templates read, as JSON: tool_calls, tool_call_id, name, reasoning_content, thinking, and
    # in the first message of a conversation its tools.
    extra: NotRequired[str | None]


class Pair(TypedDict):
    """A preference pair as text."""

    id: str
    prompt: list[Turn]
    chosen: str
    rejected: str
    source_id: str  # id of the question, or of the row in the file, that the pair was made from
    chosen_source: str  # "gold", "STAGE:INDEX" of a sample (that stage holds its seed and model), or "data" if read
    rejected_source: str  # as chosen_source
    chosen_extra: NotRequired[str | None]  # as Turn.extra, for the message with the completion
    rejected_extra: NotRequired[str | None]
    score_gap: NotRequired[float | None]  # score of the chosen side minus the rejected one's; None: unknown


class SftExample(TypedDict):
    """A prompt with the response to train on, from a file of SFT data."""

    id: str
    prompt: list[Turn]
    responses: list[str]  # one
    chosen_extra: NotRequired[str | None]  # as Pair.chosen_extra


SIDES = {"chosen": "chosen_ids", "rejected": "rejected_ids"}
"""Columns of a pair's completions, and the columns of their token ids."""


class TokenisedPair(TypedDict):
    """A preference pair as token ids; both completions end with the end-of-turn token."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    template_differs: bool  # see spo_ray.model.tokenizer.ChatTokenizer.is_changed_by_template
    score_gap: NotRequired[float | None]  # as Pair.score_gap


class ReferencedPair(TokenisedPair):
    """A tokenised pair with the reference model's log-probabilities of both completions."""

    ref_chosen_logps: float
    ref_rejected_logps: float


class ChesPair(ReferencedPair):
    """A pair with the scores of :mod:`spo_ray.model.displacement` under the reference model."""

    ches: float
    ches_per_token: float


class PairChange(TypedDict):
    """What a method's training did to a pair: changes of its log-probabilities since the reference, in nats."""

    id: str
    delta_logp_chosen: float
    delta_logp_rejected: float
    ches: NotRequired[float | None]  # as ChesPair; None: not computed
    ches_per_token: NotRequired[float | None]


class SftRow(TypedDict):
    """A tokenised SFT example."""

    id: str
    prompt_ids: list[int]
    completion_ids: list[int]
    template_differs: bool


class EvalRow(TypedDict):
    """One generated answer to one held-out question."""

    id: str
    method: str
    seed: int | None  # None: greedy
    response: str
    extracted: str | None
    correct: bool
    strict: bool


class HealthRow(TypedDict):
    """A text with its log-probabilities under a checkpoint and under the model that wrote it, end token included."""

    id: str
    checkpoint: str
    written_by: str  # the checkpoint, or the reference model
    seed: int | None  # None: greedy; else sampled at temperature 1
    response: str
    finished: bool
    logp: float  # under the checkpoint
    logp_author: float  # under the model that wrote it
    prompt_ids: list[int]
    ids: list[int]


class ShiftRow(TypedDict):
    """Log-probabilities of a text that a checkpoint wrote at temperature 1, under it and the reference model."""

    id: str
    checkpoint: str
    logp: float
    logp_sft: float  # under the reference model, with and without an SFT stage


class Output(TypedDict):
    """A checkpoint's answer to an instruction, and the baseline's."""

    id: str
    checkpoint: str
    instruction: str
    dataset: str
    output: str
    finished: bool
    baseline_output: str
    baseline: str


class Judgement(TypedDict):
    """A judge's preference between a checkpoint's output and the baseline's."""

    id: str
    checkpoint: str
    annotator: str
    preference: float | None  # from 1 (the baseline is better) to 2 (the checkpoint is better); None: no verdict
    reason: str | None  # why there is no verdict
    verdicts: list[str]  # the judge's answers, one for each order of the outputs
    checkpoint_first: list[bool]


class Provenance(TypedDict):
    """Origin of a metric: checkpoint, tokenizer, engine and sampling settings."""

    model: str  # digest of the checkpoint
    tokenizer: str
    template: str
    engine: str
    sampling: str  # settings as JSON


class Score(TypedDict):
    """One metric of one checkpoint."""

    checkpoint: str
    suite: str
    metric: str
    value: float
    low: float | None  # bounds of the 95% interval
    high: float | None
    interval: str | None  # method of the interval
    n: int  # items
    std: float | None  # standard deviation over the seeds
    seeds: list[int]
    provenance: Provenance


class Comparison(TypedDict):
    """A paired comparison of two checkpoints on the same items."""

    metric: str
    first: str
    second: str
    difference: float  # first minus second
    low: float | None  # 95% interval by paired bootstrap over the items; None if all differences are equal
    high: float | None
    p_value: float
    p_adjusted: float  # by Holm, over all comparisons of the metric
    test: str
    wins: int  # items on which the first is better
    losses: int
    n: int


class Rejected(TypedDict):
    """A quarantined row."""

    id: str
    reason: str
    excerpt: str


class Dropped(Rejected):
    """A quarantined row in a finished stage's ``rejected.parquet``."""

    stage: str


def arrow_schema(row: Any) -> pa.Schema:
    """Return the Arrow schema of a row class, so that files without rows have the same columns."""
    return pa.schema([pa.field(name, _arrow(hint)) for name, hint in get_type_hints(row).items()])


def _arrow(hint: Any) -> pa.DataType:
    if is_typeddict(hint):
        return pa.struct(list(arrow_schema(hint)))
    if get_origin(hint) is list:
        return pa.list_(_arrow(get_args(hint)[0]))
    for option in get_args(hint) or (hint,):
        if option is not type(None):
            return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}[option]
    raise TypeError(f"no Arrow type for {hint}")
