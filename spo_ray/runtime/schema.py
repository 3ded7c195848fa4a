"""The rows that cross from one stage to the next, as Parquet columns.

One row stands for one question wherever samples are concerned, with its responses in lists: then pass@K, the choice
of questions and the pairing are all row-wise and need no shuffle.
"""

from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import pyarrow as pa


class Prompt(TypedDict):
    """A question with its gold answer."""

    id: str
    prompt: str
    gold: str
    """The reference solution, ending in the gold answer."""


class SftQuestion(Prompt):
    """A question chosen for SFT with its correct responses."""

    responses: list[str]
    response_sources: list[str]
    """``gold``, or ``STAGE:INDEX`` of the sample."""


class Samples(SftQuestion):
    """A question with a model's samples; ``responses`` is carried along (empty before the SFT set exists)."""

    prompt_ids: list[int]
    """What the model was given, templated; empty where an endpoint did that."""
    refused: str | None
    """Why there are no samples, where a teacher could not be asked."""
    seed: int | None
    """All samples follow from it; None: there were none to make."""
    samples: list[str]
    sample_logps: list[float | None]
    """Sum of token log-probabilities (nats, at temperature 1) of each sample, the end token included; None: unknown."""
    sample_tokens: list[int]
    finished: list[bool]
    """Whether each sample ended with the end-of-turn token."""


class Scored(Samples):
    """Samples with their grades."""

    extracted: list[str | None]
    correct: list[bool]
    strict: list[bool]
    """Correct, and in the form that the task asks for."""


class Turn(TypedDict):
    """A chat message."""

    role: str
    content: str


class Pair(TypedDict):
    """A preference pair as text."""

    id: str
    prompt: list[Turn]
    chosen: str
    rejected: str
    source_id: str
    """The question, or the row of the file, that it was made from."""
    chosen_source: str
    rejected_source: str
    """``gold`` or ``STAGE:INDEX`` of a sample; the seed and the model stand in that stage. For ready pairs ``data``."""


class TokenisedPair(TypedDict):
    """A preference pair as token ids, completions closed with the end-of-turn token."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    template_differs: bool
    """See :meth:`spo_ray.model.tokenizer.ChatTokenizer.is_changed_by_template`."""


class ReferencedPair(TokenisedPair):
    """A tokenised pair with the reference model's log-probabilities (nats, summed over the completion)."""

    ref_chosen_logps: float
    ref_rejected_logps: float


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
    seed: int | None
    """None: greedy."""
    response: str
    extracted: str | None
    correct: bool
    strict: bool


class HealthRow(TypedDict):
    """A text and its probability under a checkpoint."""

    id: str
    checkpoint: str
    written_by: str
    """The checkpoint itself, or the SFT model."""
    seed: int | None
    """None: greedy; else at temperature 1."""
    response: str
    finished: bool
    logp: float
    """Under the checkpoint, nats, summed, the end token included."""
    logp_author: float
    """Under the model that wrote it."""
    prompt_ids: list[int]
    ids: list[int]


class ShiftRow(TypedDict):
    """What the SFT model says of a text that a checkpoint wrote at temperature 1."""

    id: str
    checkpoint: str
    logp: float
    """Under the checkpoint, nats."""
    logp_sft: float


class Output(TypedDict):
    """An answer to an instruction, and the baseline's."""

    id: str
    checkpoint: str
    instruction: str
    dataset: str
    output: str
    finished: bool
    baseline_output: str
    baseline: str


class Judgement(TypedDict):
    """A judge's view of an output."""

    id: str
    checkpoint: str
    annotator: str
    preference: float | None
    """1: the baseline's output is better, 2: the checkpoint's; None: no verdict."""
    reason: str | None
    """Why there is none."""
    verdicts: list[str]
    """What the judge said, one for each order."""
    checkpoint_first: list[bool]


class Provenance(TypedDict):
    """What a figure was measured with."""

    model: str
    """Digest of the checkpoint."""
    tokenizer: str
    template: str
    engine: str
    sampling: str
    """Settings, as JSON."""


class Score(TypedDict):
    """One figure of one checkpoint."""

    checkpoint: str
    suite: str
    metric: str
    value: float
    low: float | None
    high: float | None
    interval: str | None
    """How the 95% interval was made."""
    n: int
    """Items."""
    std: float | None
    """Standard deviation over the seeds."""
    seeds: list[int]
    provenance: Provenance


class Comparison(TypedDict):
    """Two checkpoints on the same items."""

    metric: str
    first: str
    second: str
    difference: float
    """First minus second."""
    low: float | None
    high: float | None
    """95%, paired bootstrap over the items; None where all differences are equal."""
    p_value: float
    p_adjusted: float
    """Holm's, over all comparisons of the metric."""
    test: str
    wins: int
    """Items on which the first is better."""
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
    """Arrow schema of one of the classes above: the same columns in every file, also where a file has no rows."""
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
