"""What a model answered."""

from typing import NamedTuple

TOO_LONG = "prompt longer than engine.max_model_len"
"""Why a question has no answer."""
TEMPLATE_REFUSES = "the chat template refuses the prompt"
"""The same, before what the template says."""


class Completion(NamedTuple):
    """One generated response."""

    text: str
    logp: float | None
    """Summed log-probability at temperature 1, nats, the end token included; None where an endpoint tells none."""
    tokens: int
    finished: bool
    """Whether it ended by itself."""
    ids: tuple[int, ...] = ()
    """Its tokens, the end token included; empty where an endpoint tells none."""


class Likelihood(NamedTuple):
    """How likely a given completion is."""

    logp: float
    """Summed log-probability, nats."""
    greedy: bool
    """Whether every token is the most probable one."""


class Answers(NamedTuple):
    """The responses to one question."""

    prompt_ids: list[int]
    """Empty where an endpoint has templated the prompt."""
    completions: list[Completion]
