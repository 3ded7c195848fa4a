"""GSM8K answers: extraction and equality.

Two readings of a response: ``strict`` takes the last ``#### N`` alone, as GSM8K's solutions end; ``flexible`` also what
models write that were not trained on it: ``\\boxed{N}``, "the answer is N", "A: N", and else the last number.
"""

import re
from decimal import Decimal
from fractions import Fraction

LONGEST = 25
"""Characters of a number; what is longer is babble, and no float."""
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = rf"(?:(?<![\d.])[-−]\s?)?(?:\\?\$\s?(?:[-−]\s?)?)?(?:{_INTEGER}(?:\.\d+|/\d+)?|\.\d+)"
_FIND = re.compile(_NUMBER)
_MARKED = re.compile(r"####[ \t*]*((?:[-−]\s?)?(?:\\?\$\s?)?(?:[-−]\s?)?\d[\d,]*(?:\.\d+|/\d+)?)")
_BARE = re.compile(r"\s*((?:[-−]\s?)?(?:\$\s?)?(?:[-−]\s?)?\d[\d,]*(?:\.\d+|/\d+)?)\s*")
_SAID = re.compile(rf"(?:(?i:\banswer\b)\s*(?i:is|are|:|=)|^\s*A:)[^\n\d]{{0,40}}?({_NUMBER})", re.MULTILINE)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?")


def extract(text: str) -> str | None:
    """The last ``#### N`` of a response, normalised: no separators, currency or percent sign, no trailing zeros.

    Returns None where there is none. Fractions stay fractions, in lowest terms.
    """
    found = _MARKED.findall(text)
    return _normalise(found[-1]) if found else None


def extract_flexible(text: str) -> str | None:
    """The answer by the first of these that is there: ``####``, ``\\boxed``, a said answer, the last number."""
    marked = extract(text)
    if marked is not None:
        return marked
    for candidates in (_boxed(text), _SAID.findall(text)):
        if candidates:
            return _normalise(candidates[-1])
    last = None
    for match in _FIND.finditer(text):
        last = match.group()
    return None if last is None else _normalise(last)


def gold_answer(text: str) -> str | None:
    """The gold answer of a GSM8K solution (``... #### N``), or of a bare number."""
    marked = extract(text)
    if marked is not None:
        return marked
    bare = _BARE.fullmatch(text)
    return _normalise(bare.group(1)) if bare else None


def is_correct(extracted: str | None, gold: str) -> bool:
    """Whether an extracted answer equals the gold answer as a number."""
    answer = gold_answer(gold)
    return extracted is not None and answer is not None and Fraction(extracted) == Fraction(answer)


def _boxed(text: str) -> list[str]:
    """The numbers in every ``\\boxed{...}``, the first of each."""
    found = []
    for start in (match.end() for match in re.finditer(r"\\boxed\s*\{", text)):
        depth, end = 1, start
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        content = _FRACTION.sub(r"\1/\2", text[start : end - 1]).replace("{,}", ",").replace("\\!", "")
        found += [match.group() for match in _FIND.finditer(content)][:1]
    return found


def _normalise(number: str) -> str | None:
    text = re.sub(r"[\s$\\,]", "", number).replace("−", "-")
    if len(text) > LONGEST:
        return None
    try:
        if "/" in text:
            return str(Fraction(text))
        return f"{Decimal(text).normalize() + 0:f}"
    except ZeroDivisionError:
        return None
