"""Verifiers judge if an answer is correct. They are named in the configuration: one of these, or one of your own."""

from typing import NamedTuple, Protocol

from spo_ray.errors import UserError
from spo_ray.runtime.own_code import load_own, source_digest

VERIFIERS = {"gsm8k": "spo_ray.data.gsm8k:Gsm8k"}
"""Import paths of the verifiers that have a name."""


class Grade(NamedTuple):
    """The answer found in a response, and its correctness."""

    extracted: str | None
    correct: bool
    strict: bool
    """Correct, and in the form that the task asks for."""


class Verifier(Protocol):
    """Interface of a verifier; ``docs/data.md`` shows how to write one."""

    def accepts(self, answer: str) -> bool:
        """Return True if responses can be compared with a row's answer."""
        ...

    def grade(self, response: str, answer: str) -> Grade:
        """Compare a response with a row's answer; must not raise, whatever the response."""
        ...


def verifier_of(data: object) -> str:
    """Return the name of the verifier for a run's data."""
    return getattr(data, "verifier", "gsm8k")


def verifier_identity(name: str) -> str:
    """Return a verifier's name, with a digest of its module if it is your own: changed code can change the grades."""
    if name in VERIFIERS:
        return name
    return f"{name}@{source_digest(type(load_verifier(name)))}"


def load_verifier(name: str) -> Verifier:
    """Create a verifier from its name, or from ``package.module:Class``, which is called without arguments.

    Raises:
        UserError: there is no such name, module or class, or it lacks a method.
    """
    path = VERIFIERS.get(name, name)
    known = f"data.verifier={name!r}: known are {', '.join(VERIFIERS)}, or package.module:Class"
    if ":" not in path:
        raise UserError(known)
    try:
        verifier = load_own(path, known)()
    except TypeError as error:
        raise UserError(f"{known} ({error}); it is called without arguments") from error
    missing = [method for method in ("accepts", "grade") if not callable(getattr(verifier, method, None))]
    if missing:
        raise UserError(f"data.verifier={name!r} has no method {missing[0]}()")
    return verifier
