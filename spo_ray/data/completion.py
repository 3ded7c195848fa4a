"""What a model answered."""

from typing import NamedTuple


class Completion(NamedTuple):
    """One generated response."""

    text: str
    logp: float | None
    """Summed log-probability at temperature 1, nats, the end token included; None where an endpoint tells none."""
    tokens: int
    finished: bool
    """Whether it ended by itself."""


class Answers(NamedTuple):
    """The responses to one question."""

    prompt_ids: list[int]
    """Empty where an endpoint has templated the prompt."""
    completions: list[Completion]
