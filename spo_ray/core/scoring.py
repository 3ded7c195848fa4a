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
_SIGN = r"(?:(?<![\w.])(?:-|−\s?))?"  # a hyphen before a space is a dash, or a bullet
_NUMBER = rf"{_SIGN}(?:\\?\$\s?-?)?(?<!\^)(?:{_INTEGER}(?:\.\d+|/\d+)?|\.\d+)"
_FIND = re.compile(_NUMBER)
_WRITTEN = r"[-−]?(?:\\?\$\s?)?-?\d[\d,]*(?:\.\d+|/\d+)?"
_MARKED = re.compile(rf"####[ \t*]*({_WRITTEN})(?!\d|,\d|\.\d)(?![.)][ \t]+\S)")  # "#### 1. Cost" is a heading
_BARE = re.compile(rf"\s*({_WRITTEN})\s*")
_SAID = re.compile(rf"(?:(?i:\banswer\b)\s*(?i:is|are|:|=)|^\s*A:)[^\n\d]{{0,40}}?(?={_NUMBER})", re.MULTILINE)
_SUM = re.compile(rf"{_NUMBER}(?:\s*[-+*/×÷x]\s*{_NUMBER})+\s*=\s*({_NUMBER})")
_FRACTION = re.compile(r"(\d+)?\s*\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?")


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
    text = _FRACTION.sub(_plain, text.replace("{,}", ",").replace("\\,", "").replace("\\!", ""))
    for candidates in (_boxed(text), [_first(text, match.end()) for match in _SAID.finditer(text)]):
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
    """The numbers in every ``\\boxed{...}``, also in one that was cut off."""
    found = []
    for start in (match.end() for match in re.finditer(r"\\boxed\s*\{", text)):
        depth, end = 1, start
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        content = text[start : end - (depth == 0)]
        found += [_first(content, match.start()) for match in _FIND.finditer(content)][:1]
    return found


def _first(text: str, start: int) -> str:
    """The number at a place, or what the calculation there comes to."""
    calculation = _SUM.match(text, start)
    number = calculation.group(1) if calculation else None
    found = _FIND.match(text, start)
    return number or (found.group() if found else "")


def _plain(fraction: re.Match[str]) -> str:
    whole, above, below = fraction.groups()
    if len(fraction.group()) > 2 * LONGEST:
        return fraction.group()
    return f"{int(whole or 0) * int(below) + int(above)}/{int(below)}"


def _normalise(number: str) -> str | None:
    text = re.sub(r"[\s$\\,]", "", number).replace("−", "-")
    if len(text) > LONGEST:
        return None
    try:
        if "/" in text:
            return str(Fraction(text))
        return f"{Decimal(text).normalize() + 0:f}"
    except (ArithmeticError, ValueError):  # two signs, or divided by zero
        return None
