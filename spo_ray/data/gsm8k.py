"""GSM8K answers: extraction and equality.

Two readings of a response: ``strict`` takes the last ``#### N`` alone, as GSM8K's solutions end; ``flexible`` also what
models write that were not trained on it: ``\boxed{N}``, "the answer is N", "A: N", and else the last number.
"""

import re
import sys
from bisect import bisect_left
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

LONGEST = 25
"""Characters of a number; what is longer is babble, and no float."""
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_SIGN = r"(?:(?<![\w.])(?:-|−\s?))?"  # a hyphen before a space is a dash, or a bullet
_BEFORE = rf"{_SIGN}(?:\\?\$\s?-?)?(?<!\^)"
_NUMBER = rf"{_BEFORE}(?:{_INTEGER}(?:\.\d+|/\d+)?|\.\d+)"
_FIND = re.compile(_NUMBER)
_WRITTEN = r"[-−]?(?:\\?\$\s?)?-?\d[\d,]*(?:\.\d+|/\d+)?"
_MARKED = re.compile(rf"####[ \t*]*({_WRITTEN})(?!\d|,\d|\.\d)(?=([.)][ \t]+\S)|)")  # "#### 1. Cost": may be a heading
_BARE = re.compile(rf"\s*({_WRITTEN})\s*")
_ANSWER_IS = r"(?i:\banswer\b)\s*(?i:is|are|:|=)"
_LETTERED = r"^[^\S\n]*{}:"  # A: is an answer, unless it stands among B: and others
_UNTIL = rf"[^\n\d]{{0,40}}?(?={_NUMBER})"
_SAID = re.compile(rf"(?:{_ANSWER_IS}|{_LETTERED.format('A')}){_UNTIL}", re.MULTILINE)
_SAID_IN_WORDS = re.compile(rf"{_ANSWER_IS}{_UNTIL}")
_OTHER_LETTER = re.compile(_LETTERED.format("B"), re.MULTILINE)
# Here 3/4 is a division: were it a number too, there would be two ways to read each of a thousand.
_OPERAND = rf"{_BEFORE}(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_MORE = rf"\s*[-+*/×÷x]\s*{_OPERAND}"
_SUM = re.compile(rf"{_OPERAND}(?:{_MORE})+(?:\s*=\s*{_OPERAND}(?:{_MORE})*)*\s*=\s*({_NUMBER})")
_FRACTION = re.compile(r"(?:(?<!\d)(\d+)\s{0,9})?\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?")
_BRACE = re.compile(r"(\\boxed\s*)?\{|\}")


def extract(text: str) -> str | None:
    """The last ``#### N`` of a response, normalised: no separators, currency or percent sign, no trailing zeros.

    Returns None where there is none. Fractions stay fractions, in lowest terms.
    """
    found = list(_MARKED.finditer(text))
    if len(found) > 1:
        found = [match for match in found if not match.group(2)]
    return _normalise(found[-1].group(1)) if found else None


def extract_flexible(text: str) -> str | None:
    """The answer by the first of these that is there: ``####``, ``\\boxed``, a said answer, the last number."""
    marked = extract(text)
    if marked is not None:
        return marked
    text = _FRACTION.sub(_plain, text.replace("{,}", ",").replace("\\,", "").replace("\\!", ""))
    numbers = list(_FIND.finditer(text))
    boxed = _boxed(text, [match.start() for match in numbers])
    if boxed is not None:
        return _normalise(boxed)
    said = list((_SAID_IN_WORDS if _OTHER_LETTER.search(text) else _SAID).finditer(text))
    if said:
        return _normalise(_first(text, said[-1].end()))
    return _normalise(numbers[-1].group()) if numbers else None


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


def _boxed(text: str, numbers: Sequence[int]) -> str | None:
    """The number in the last ``\\boxed{...}`` that has one, also in one that was cut off.

    ``numbers`` is where the text's numbers begin.
    """
    boxes: list[tuple[int, int]] = []
    opened: list[tuple[int, bool]] = []
    for brace in _BRACE.finditer(text):
        if brace.group() != "}":
            opened.append((brace.end(), brace.group(1) is not None))
        elif opened:
            start, is_box = opened.pop()
            boxes += [(start, brace.start())] if is_box else []
    boxes += [(start, len(text)) for start, is_box in opened if is_box]
    for start, end in sorted(boxes, reverse=True):
        i = bisect_left(numbers, start)
        if i < len(numbers) and numbers[i] < end:
            return _first(text, numbers[i], end)
    return None


def _first(text: str, start: int, end: int = sys.maxsize) -> str:
    """The number at a place, or what the calculation there comes to."""
    calculation = _SUM.match(text, start, end)
    number = calculation.group(1) if calculation else None
    found = _FIND.match(text, start, end)
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
