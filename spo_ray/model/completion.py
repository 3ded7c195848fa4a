"""What a model answered."""

import importlib.util
from typing import NamedTuple

from spo_ray.config.data import EngineConfig
from spo_ray.errors import UserError

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


class Generations(NamedTuple):
    """The responses to one question."""

    prompt_ids: list[int]
    """Empty where an endpoint has templated the prompt."""
    completions: list[Completion]


class Skipped(NamedTuple):
    """A question that was not answered."""

    reason: str


def choose_engine(config: EngineConfig) -> tuple[str, str]:
    """(engine, why).

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if config.type == "vllm" and not installed:
        raise UserError("engine.type=vllm, but vLLM is not installed: make setup, or engine.type=transformers")
    if config.type != "auto":
        return config.type, "as configured"
    return ("vllm", "installed") if installed else ("transformers", "vLLM is not installed; expect it to be slow")


def fits_context(prompt_ids: list[int], config: EngineConfig, answer: int = 1) -> bool:
    """Whether an engine can take a prompt with an answer of so many tokens, and score both."""
    return len(prompt_ids) + answer < config.max_model_len
