"""Answers of all checkpoints to the same held-out prompts, with what differs from the reference's answer."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

SHOWN_PROMPTS = 50
"""Number of held-out prompts whose answers are shown, unless asked for another."""
SHOWN_CHARACTERS = 1500
"""Characters of an answer that are shown."""
MOST_CHARACTERS = 250_000
"""Characters of all answers together, beyond which no more prompts are shown unless asked for."""
Answers = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Rows with answers, by checkpoint and id of the prompt."""


def shown_samples(
    greedy: Answers, prompts: Sequence[Mapping[str, Any]], reference: str, most: int | None = None
) -> dict[str, Any] | None:
    """Return held-out prompts with all answers, those on which checkpoints disagree first; None without answers.

    At most ``most`` prompts; without a number ``SHOWN_PROMPTS``, or fewer if the answers are long.

    Each has ``moves``, by which the page filters: "wrong" and "wrong:METHOD" where the reference was right and a method
    is not, "right" and "right:METHOD" the other way round.
    """
    if not greedy:
        return None
    first = next(iter(greedy.values()))
    by_id = {row["id"]: row for row in prompts}
    disputed = [i for i in first if len({rows[i].get("correct", rows[i]["response"]) for rows in greedy.values()}) > 1]
    lines, length = [], 0
    for row_id in [*disputed, *(i for i in first if i not in set(disputed))][: most or SHOWN_PROMPTS]:
        length += sum(len(rows[row_id]["response"][:SHOWN_CHARACTERS]) for rows in greedy.values())
        if most is None and length > MOST_CHARACTERS and lines:
            break
        asked, answers = by_id[row_id], {name: rows[row_id] for name, rows in greedy.items()}
        lines.append({"prompt": _prompt(asked["prompt"]), "gold": asked.get("gold")} | _compared(answers, reference))
    moved = dict.fromkeys(move for line in lines for move in line["moves"])
    return {
        "lines": lines,
        "asked": len(first),
        "graded": "correct" in next(iter(first.values())),
        "filters": {move: _in_words(move) for move in sorted(moved, key=lambda move: (":" in move, move))},
    }


def _compared(answers: Mapping[str, Mapping[str, Any]], reference: str) -> dict[str, Any]:
    """Return the answers to one prompt in pieces, and how each method's grade moved."""
    usual = answers.get(reference, next(iter(answers.values())))
    shown, moves = [], []
    for name, row in answers.items():
        text, same = _cut(row["response"]), row is not usual and row["response"] == usual["response"]
        pieces = [] if same else differing(text, _cut(usual["response"]))
        shown.append({"name": name, "pieces": pieces, "same": same, "correct": row.get("correct")})
        if name != "base" and row.get("correct") != usual.get("correct"):
            move = "right" if row["correct"] else "wrong"
            moves += [move, f"{move}:{name}"]
    return {"answers": shown, "moves": list(dict.fromkeys(moves))}


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"


def _in_words(move: str) -> str:
    to, _, name = move.partition(":")
    return f"{name or 'any method'}: changed from {'wrong to right' if to == 'right' else 'right to wrong'}"


def _prompt(prompt: Any) -> str:
    """Return a question, or a conversation as text."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def differing(value: str, other: str) -> list[tuple[str, bool]]:
    """Split ``value`` into pieces, each with True if ``other`` has no such words there; empty: it has more."""
    mine, theirs = (re.findall(r"\s+|\w+|[^\w\s]", words) for words in (value, other))
    matches = SequenceMatcher(None, theirs, mine, autojunk=False).get_opcodes()
    return [("".join(mine[start:end]), kind != "equal") for kind, _, _, start, end in matches]
