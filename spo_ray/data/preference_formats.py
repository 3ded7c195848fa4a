"""Converts rows of several formats to one: messages of the prompt, and completions as text.

The formats of preference rows are TRL's standard and conversational ones, with or without a prompt of their own, and
UltraFeedback as published (completions with scores) or binarised (whole conversations on both sides). Those of SFT rows
are TRL's too.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from spo_ray.data.pairs import common_prefix
from spo_ray.errors import RowRejectedError
from spo_ray.runtime import schema

ROLES = ("system", "developer", "user", "assistant", "tool")


class Preference(NamedTuple):
    """One preference pair."""

    prompt: list[schema.Turn]
    chosen: str
    rejected: str


def preference(row: Mapping[str, Any], *, rejected: Literal["worst", "random"] = "worst", seed: str = "") -> Preference:
    """Convert a row of any of the formats.

    ``rejected`` says which of several scored completions is paired with the best one; ``random`` depends on ``seed``.

    Raises:
        RowRejectedError: the row has none of the formats; the message says what is wrong.
    """
    if "completions" in row:
        return _scored(row, rejected, seed)
    sides = [_field(row, name) for name in ("chosen", "rejected")]
    prompt = row.get("prompt")
    if all(isinstance(side, str) for side in sides):
        opening, (chosen, lost) = (_messages(prompt), sides) if prompt is not None else _split_text(*sides)
    elif all(isinstance(side, Sequence) and not isinstance(side, str) for side in sides):
        opening, (chosen, lost) = _split_messages(*([*map(_turn, side)] for side in sides), prompt)
    else:
        raise RowRejectedError("'chosen' and 'rejected' are not both text, nor both messages")
    return Preference(opening, _text(chosen, "chosen"), _text(lost, "rejected"))


def example(row: Mapping[str, Any]) -> tuple[list[schema.Turn], str]:
    """Return prompt and completion of an SFT row: ``prompt`` and ``completion``, as text or messages, or ``messages``.

    Of a conversation the last message is the completion; those before it are the prompt.

    Raises:
        RowRejectedError: the row has neither format; the message says what is wrong.
    """
    name = "messages" if "messages" in row else "completion"
    turns, opening = _field(row, name), [] if name == "messages" else _messages(_field(row, "prompt"))
    if opening and isinstance(turns, str):
        return opening, _text(turns, name)
    *before, last = _messages(turns, name)
    if last["role"] != "assistant":
        raise RowRejectedError(f"{name!r} does not end in an assistant's message")
    if not opening and not before:
        raise RowRejectedError("no 'prompt'")
    return [*opening, *before], last["content"]


def _scored(row: Mapping[str, Any], which: str, seed: str) -> Preference:
    """Convert a row as UltraFeedback was published: the best completion against the worst, or any that scores lower."""
    name = "instruction" if "instruction" in row else "prompt"
    prompt, completions = _messages(_field(row, name)), row["completions"]
    found: list[tuple[float, str]] = []
    for completion in completions if isinstance(completions, Sequence) else []:
        keys = completion if isinstance(completion, Mapping) else {}
        scores = (keys.get(key) for key in ("overall_score", "score", "rating"))
        score = next((score for score in scores if score is not None), None)
        if not isinstance(score, int | float) or not isinstance(keys.get("response"), str) or score != score:
            raise RowRejectedError("a completion has no 'response' or no 'overall_score'")
        found.append((float(score), keys["response"]))
    best, chosen = max(found, key=lambda pair: pair[0], default=(0.0, ""))  # the first of equals
    lower = [pair for pair in found if pair[0] < best]
    if not lower:
        raise RowRejectedError("no completion is scored lower than the best")
    _, lost = random.Random(seed).choice(lower) if which == "random" else min(lower, key=lambda pair: pair[0])
    return Preference(prompt, _text(chosen, "chosen"), _text(lost, "rejected"))


def _split_text(chosen: str, rejected: str) -> tuple[list[schema.Turn], tuple[str, str]]:
    """Split two texts without a prompt: it is their common beginning, up to the end of a word."""
    common = common_prefix(chosen, rejected)
    if common in (len(chosen), len(rejected)):
        raise RowRejectedError("no 'prompt', and one side is the beginning of the other")
    while common and not chosen[common - 1].isspace():
        common -= 1
    if not chosen[:common].strip():
        raise RowRejectedError("no 'prompt', and the sides have no common beginning")
    return _messages(chosen[:common].rstrip()), (chosen[common:], rejected[common:])


def _split_messages(
    chosen: list[schema.Turn], rejected: list[schema.Turn], prompt: Any
) -> tuple[list[schema.Turn], tuple[str, str]]:
    """Split two conversations that end in an assistant's message; the turns before are the prompt, or follow it."""
    before = chosen[:-1]
    if before != rejected[:-1]:
        raise RowRejectedError("'chosen' and 'rejected' answer different prompts")
    opening = [] if prompt is None else _messages(prompt)
    if not before and not opening:
        raise RowRejectedError("no 'prompt'")
    ends = [side[-1] if side else {"role": "", "content": ""} for side in (chosen, rejected)]
    if any(end["role"] != "assistant" for end in ends):
        raise RowRejectedError("a side does not end in an assistant's message")
    if before and (before[: len(opening)] == opening or not isinstance(prompt, list)):
        opening = []  # whole conversations, which repeat the prompt
    return [*opening, *before], (ends[0]["content"], ends[1]["content"])


def _messages(value: Any, name: str = "prompt") -> list[schema.Turn]:
    if isinstance(value, str):
        return [{"role": "user", "content": _text(value, name)}]
    if not isinstance(value, Sequence) or not value:
        raise RowRejectedError(f"{name!r} is no text, and no list of messages")
    return [_turn(message) for message in value]


def _turn(message: Any) -> schema.Turn:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise RowRejectedError(f"a message without a role of {', '.join(ROLES)}")
    return {"role": message["role"], "content": _text(message.get("content"), "content")}


def _text(value: Any, name: str) -> str:
    reason = text_defect(value, name)
    if reason:
        raise RowRejectedError(reason)
    return value


def text_defect(value: Any, name: str, *, may_be_empty: bool = False) -> str | None:
    """Return the reason why a value can't be used as text; None if it can."""
    if not isinstance(value, str):
        return f"{name!r} is no text"
    if not value.strip() and not may_be_empty:
        return f"{name!r} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{name!r} is not valid Unicode"
    return None


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise RowRejectedError(f"no column {name!r}")
    return row[name]
