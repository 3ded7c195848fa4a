"""What is a correct answer: GSM8K's rule, or a rule of your own by its import path."""

import hashlib
import importlib
import inspect
from typing import NamedTuple, Protocol

from spo_ray.data.gsm8k import extract, extract_flexible, gold_answer, is_correct
from spo_ray.errors import UserError


class Grade(NamedTuple):
    """What was found in a response, and whether it is right."""

    extracted: str | None
    correct: bool
    strict: bool
    """Right, and in the form that the task asks for."""


class Verifier(Protocol):
    """Grades responses. ``docs/data.md`` has one for another task."""

    def accepts(self, answer: str) -> bool:
        """Whether a row's answer is one that responses can be compared with."""
        ...

    def grade(self, response: str, answer: str) -> Grade:
        """Compare a response with a row's answer; must not raise, whatever the response."""
        ...


class Gsm8k:
    """The last number, however it is written; ``strict`` only behind ``####``."""

    def accepts(self, answer: str) -> bool:
        return gold_answer(answer) is not None

    def grade(self, response: str, answer: str) -> Grade:
        found = extract_flexible(response)
        return Grade(found, is_correct(found, answer), is_correct(extract(response), answer))


VERIFIERS: dict[str, type[Verifier]] = {"gsm8k": Gsm8k}


def verifier_of(data: object) -> str:
    """The name of the rule for a run's questions."""
    return getattr(data, "verifier", "gsm8k")


def verifier_identity(name: str) -> str:
    """A rule's name, and for one of your own a digest of its module: grades change with it."""
    if name in VERIFIERS:
        return name
    module = inspect.getmodule(type(load_verifier(name)))
    source = inspect.getsource(module) if module else ""
    return f"{name}@{hashlib.sha256(source.encode()).hexdigest()[:16]}"


def load_verifier(name: str) -> Verifier:
    """A verifier by its name here, or by ``package.module:Class``, which is imported and called without arguments.

    Raises:
        UserError: there is no such name, module or class, or it lacks a method.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]()
    module, colon, attribute = name.partition(":")
    known = f"data.verifier={name!r}: known are {', '.join(VERIFIERS)}, or package.module:Class"
    if not colon:
        raise UserError(known)
    try:
        verifier = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"{known} ({error}); the module must be importable on every node (PYTHONPATH)") from error
    missing = [method for method in ("accepts", "grade") if not callable(getattr(verifier, method, None))]
    if missing:
        raise UserError(f"data.verifier={name!r} has no method {missing[0]}()")
    return verifier
