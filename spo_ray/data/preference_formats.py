"""Converts preference rows of several formats to one: messages of the prompt, and two completions as text.

The formats are TRL's standard and conversational ones, with or without a prompt of their own, UltraFeedback as
published (completions with scores) or binarised (whole conversations on both sides), transcripts as in hh-rlhf, and the
columns of ShareGPT, LLaMA-Factory, ms-swift and OpenAI.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from spo_ray.data.messages import MEDIA, messages, refuse_media, text, transcript, with_columns
from spo_ray.errors import RowRejectedError
from spo_ray.runtime import schema

NAMES = {
    "prompt": ("prompt", "instruction", "conversations", "messages"),
    "chosen": ("chosen", "preferred_output"),
    "rejected": ("rejected", "non_preferred_output", "rejected_messages", "rejected_response"),
    "system": ("system",),
    "tools": ("tools",),
    "completions": ("completions",),
    "score_chosen": ("score_chosen", "chosen_score", "chosen-rating", "chosen_rating", "chosen_reward"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected-rating", "rejected_rating", "rejected_reward"),
}
"""Names that a column may have, besides the one in ``data.columns``; the first that holds something counts."""
READ = {*MEDIA, *(name for names in NAMES.values() for name in names), "input", "history"}
"""All columns that are looked at."""


class Preference(NamedTuple):
    """One preference pair."""

    prompt: list[schema.Turn]
    chosen: str
    rejected: str
    chosen_extra: str | None = None
    """Further fields of the chosen message that templates read, such as ``tool_calls``, as JSON."""
    rejected_extra: str | None = None
    score_gap: float | None = None
    """Score of the chosen completion minus that of the rejected one; None: unknown."""


def preference(
    row: Mapping[str, Any],
    *,
    rejected: Literal["worst", "random"] = "worst",
    seed: str = "",
    columns: Mapping[str, str] | None = None,
) -> Preference:
    """Convert a row of any of the formats.

    ``rejected`` says which of several scored completions is paired with the best one; ``random`` depends on ``seed``.
    ``columns`` maps names of :data:`NAMES` to the row's own columns.

    Raises:
        RowRejectedError: the row has none of the formats, or can't be used; the message says what is wrong.
    """
    found = _named(row, columns or {})
    if found["completions"] is not None and (found["chosen"] is None or found["rejected"] is None):
        sides, gap = _scored(found["completions"], rejected, seed)
    else:
        gap = _gap(found["score_chosen"], found["score_rejected"])
        sides = [_side(found, row, name) for name in ("chosen", "rejected")]
    if len({isinstance(side, str) for side in sides}) > 1:
        raise RowRejectedError("'chosen' and 'rejected' are not both text, nor both messages")
    opening = [] if found["prompt"] is None else [*_history(row), *messages(found["prompt"], "prompt")]
    answers: list[schema.Turn]
    if isinstance(sides[0], str):
        if not opening:
            raise RowRejectedError(_no_column("prompt", row))
        answers = [
            {"role": "assistant", "content": text(side, name)}
            for side, name in zip(sides, ("chosen", "rejected"), strict=True)
        ]
    else:
        opening, answers = _split(opening, *sides)
    _check_differ(answers)
    chosen, lost = answers
    prompt = with_columns(opening, found["system"], found["tools"])
    return Preference(prompt, chosen["content"], lost["content"], chosen.get("extra"), lost.get("extra"), gap)


def unread(row: Mapping[str, Any], columns: Mapping[str, str]) -> set[str]:
    """Return the columns of a row that are not looked at, also those whose place another one takes."""
    used = {*_keys(row, columns).values(), *MEDIA, "history"}
    used |= {"input"} if row.get("instruction") or isinstance(row.get("input"), Mapping) else set()
    return {name for name, value in row.items() if name not in used and not (name in READ and value is None)}


def _keys(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Return the columns that hold what a row has, by the names of :data:`NAMES`."""
    found = {}
    for name, names in NAMES.items():
        keys = [columns[name]] if name in columns else names
        found[name] = next((key for key in keys if row.get(key) is not None), "")
    return {name: key for name, key in found.items() if key}


def _named(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a row by the names of :data:`NAMES`; None where it has none."""
    refuse_media(row)
    whole = row.get("input")
    if isinstance(whole, Mapping):  # OpenAI's format
        row = {**row, **whole}
    for name, column in columns.items():
        if column not in row:
            raise RowRejectedError(f"no column {column!r}, which data.columns.{name} names")
    keys = _keys(row, columns)
    found = {name: row[keys[name]] if name in keys else None for name in NAMES}
    instruction = row.get("instruction")
    if isinstance(whole, str) and whole.strip() and instruction and found["prompt"] == instruction:
        found["prompt"] = f"{instruction}\n{whole}"  # as LLaMA-Factory joins them
    if found["chosen"] is None and found["rejected"] is not None and row.get("messages"):
        found["chosen"], found["prompt"] = row["messages"], None  # ms-swift: the messages end in the chosen answer
        if isinstance(found["rejected"], str) and isinstance(row["messages"], list):
            found["rejected"] = [*row["messages"][:-1], {"role": "assistant", "content": found["rejected"]}]
    return found


def _history(row: Mapping[str, Any]) -> list[schema.Turn]:
    """Return the messages of LLaMA-Factory's earlier turns, which are pairs of a question and its answer."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowRejectedError("'history' is no list of pairs of a question and its answer")
    roles: tuple[Any, ...] = ("user", "assistant")
    return [
        {"role": role, "content": text(said, "history")}
        for pair in pairs
        for role, said in zip(roles, pair, strict=True)
    ]


def _no_column(name: str, row: Mapping[str, Any]) -> str:
    others = sorted(key for key, value in row.items() if key not in READ - {"input"} and isinstance(value, str | list))
    advice = f": set data.columns.{name} to one of {', '.join(map(repr, others))}" if others else ""
    return f"no column {name!r}{advice}"


def _side(found: Mapping[str, Any], row: Mapping[str, Any], name: str) -> Any:
    """Return one side: a text, or a list of messages, also of a transcript."""
    value = found[name]
    if value is None:
        raise RowRejectedError(_no_column(name, row))
    if isinstance(value, str):
        return transcript(value, name) or value
    return messages(value, name)


def _scored(completions: Any, which: str, seed: str) -> tuple[list[Any], float]:
    """Return the best of UltraFeedback's completions with the worst or any that scores lower, and how much lower.

    Completions without a score or a response are left out.
    """
    found: list[tuple[float, str]] = []
    for completion in completions if isinstance(completions, Sequence) else []:
        keys = completion if isinstance(completion, Mapping) else {}
        scores = (keys.get(key) for key in ("overall_score", "score", "rating"))
        score = next((score for score in scores if _is_number(score)), None)
        if score is not None and isinstance(keys.get("response"), str) and keys["response"].strip():
            found.append((float(score), keys["response"]))
    if not found:
        raise RowRejectedError("'completions' has none with a 'response' and an 'overall_score'")
    best, chosen = max(found, key=lambda pair: pair[0])  # the first of equals
    lower = [pair for pair in found if pair[0] < best]
    if not lower:
        raise RowRejectedError("no completion is scored lower than the best")
    least, lost = random.Random(seed).choice(lower) if which == "random" else min(lower, key=lambda pair: pair[0])
    return [chosen, lost], best - least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _gap(best: Any, worst: Any) -> float | None:
    """Return the difference of two scores; None if one is missing or no number."""
    if not _is_number(best) or not _is_number(worst):
        return None
    if best <= worst:
        raise RowRejectedError("by their scores 'chosen' is not better than 'rejected'")
    return float(best - worst)


def _split(
    opening: list[schema.Turn], chosen: list[schema.Turn], rejected: list[schema.Turn]
) -> tuple[list[schema.Turn], list[schema.Turn]]:
    """Return (prompt, both answers) of two conversations that differ in their last message, the assistant's."""
    ends = [side[-1] if side else None for side in (chosen, rejected)]
    if any(end is None or end["role"] != "assistant" for end in ends):
        raise RowRejectedError("a side does not end in an assistant's message")
    before = chosen[:-1]
    if before != rejected[:-1]:
        first = _common([chosen, rejected])
        same = first and chosen[first - 1]["role"] != "assistant"
        why = "differ before their last messages" if same else "answer different prompts"
        raise RowRejectedError(f"'chosen' and 'rejected' {why}")
    prompt = _joined(opening, before)
    if not prompt:
        raise RowRejectedError("no 'prompt'")
    return prompt, [end for end in ends if end is not None]


def _common(sides: Iterable[Sequence[schema.Turn]]) -> int:
    """Return the number of messages that two conversations have in common at their start."""
    one, other = sides
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)


def _joined(opening: list[schema.Turn], before: list[schema.Turn]) -> list[schema.Turn]:
    """Join the prompt's messages and those of the sides, which may repeat all of them or the last ones."""
    keys = [[(turn["role"], turn["content"].strip()) for turn in turns] for turns in (opening, before)]
    size = len(opening)
    if any(keys[1][i : i + size] == keys[0] for i in range(len(before) - size + 1)):
        return before
    shared = next(n for n in range(min(size, len(before)), -1, -1) if keys[0][size - n :] == keys[1][:n])
    rest = before[shared:]
    again = rest and rest[0]["role"] in ("system", opening[-1]["role"])
    if not shared and (again or set(keys[0]) & set(keys[1])):
        raise RowRejectedError("'prompt' is not the beginning of the conversations in 'chosen' and 'rejected'")
    return [*opening, *rest]


def _check_differ(answers: Sequence[schema.Turn]) -> None:
    one, other = ({**answer, "content": answer["content"].strip()} for answer in answers)
    if one == other:
        raise RowRejectedError("'chosen' and 'rejected' are the same but for white space")
