"""Results of generation engines, and the choice of an engine."""

import importlib.util
from typing import NamedTuple

from spo_ray.config.data import EngineConfig
from spo_ray.errors import UserError

TOO_LONG = "prompt longer than engine.max_model_len"
"""Reason why a question has no answer."""
HIGHEST_LOGP = 1e-3
"""Highest log-probability that rounding can give."""


class Completion(NamedTuple):
    """One generated response."""

    text: str
    logp: float | None
    """Log-probability at temperature 1 (nats), end token included; None if an endpoint does not return it."""
    tokens: int
    finished: bool
    """True if it ends with the end token, not at the token limit."""
    ids: tuple[int, ...] = ()
    """Token ids, end token included; empty for an endpoint."""


class Likelihood(NamedTuple):
    """Likelihood of a given completion."""

    logp: float
    """Log-probability (nats)."""
    greedy: bool
    """True if every token is the most probable one."""


class Generations(NamedTuple):
    """Responses to one question."""

    prompt_ids: list[int]
    """Token ids of the prompt; empty for an endpoint."""
    completions: list[Completion]


class Skipped(NamedTuple):
    """A question that was not answered."""

    reason: str


def choose_engine(config: EngineConfig) -> tuple[str, str]:
    """Return the engine's kind, and the reason for it.

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
    """Return True if an engine can take a prompt with an answer of so many tokens, and score both."""
    return len(prompt_ids) + answer < config.max_model_len


def valid_text(value: object) -> str:
    """Return a text from a server, or an empty one for None; half surrogates, which no file holds, become U+FFFD.

    Raises:
        TypeError: it is no text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("its content is no text")
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
