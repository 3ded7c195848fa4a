r"""GSM8K: extracts the answers of responses, compares them, and grades.

There are two ways to read a response. Strict: only the last ``#### N``, the form in which GSM8K's solutions end.
Flexible: also what models write that were not trained on GSM8K, which is ``\boxed{N}``, "the answer is N", "A: N", or
else the last number.
"""

import re
import sys
from bisect import bisect_left
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from spo_ray.data.verifiers import Grade

LONGEST = 25
"""Longest number in characters; longer ones are degenerate text and too large for a float."""
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_SIGN = r"(?:(?<![\w.])(?:-|−\s?))?"  # a hyphen before a space is a dash, or a bullet
_BEFORE = rf"{_SIGN}(?:\\?\$\s?-?)?(?<!\^)"
_NUMBER = rf"{_BEFORE}(?:{_INTEGER}(?:\.\d+|/\d+)?|\.\d+)"
_FIND = re.compile(_NUMBER)
_WRITTEN = r"[-−]?(?:\\?\$\s?)?-?\d[\d,]*(?:\.\d+|/\d+)?"
_MARKED = re.compile(rf"####[ \t*]*({_WRITTEN})(?!\d|,\d|\.\d)(?=([.)][ \t]+\S)|)")  # "#### 1. Cost" may be a heading
_BARE = re.compile(rf"\s*({_WRITTEN})\s*")
_ANSWER_IS = r"(?i:\banswer\b)\s*(?i:is|are|:|=)"
_LETTERED = r"^[^\S\n]*{}:"  # "A:" marks an answer, unless there is also "B:"
_UNTIL = rf"[^\n\d]{{0,40}}?(?={_NUMBER})"
_SAID = re.compile(rf"(?:{_ANSWER_IS}|{_LETTERED.format('A')}){_UNTIL}", re.MULTILINE)
_SAID_IN_WORDS = re.compile(rf"{_ANSWER_IS}{_UNTIL}")
_OTHER_LETTER = re.compile(_LETTERED.format("B"), re.MULTILINE)
# Here 3/4 is only a division. If it could also be a number, matching would take exponential time.
_OPERAND = rf"{_BEFORE}(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_MORE = rf"\s*[-+*/×÷x]\s*{_OPERAND}"
_SUM = re.compile(rf"{_OPERAND}(?:{_MORE})+(?:\s*=\s*{_OPERAND}(?:{_MORE})*)*\s*=\s*({_NUMBER})")
_FRACTION = re.compile(r"(?:(?<!\d)(\d+)\s{0,9})?\\[dt]?frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?")
_BRACE = re.compile(r"(\\boxed\s*)?\{|\}")


class Gsm8k:
    """Verifier for GSM8K: ``correct`` reads the response flexibly, ``strict`` takes only the number behind ``####``."""

    def accepts(self, answer: str) -> bool:
        """Return True if the answer is a GSM8K solution or a number."""
        return gold_answer(answer) is not None

    def grade(self, response: str, answer: str) -> Grade:
        """Compare the response's answer with the gold answer as numbers."""
        found = extract_flexible(response)
        return Grade(found, is_correct(found, answer), is_correct(extract(response), answer))


def extract(text: str) -> str | None:
    """Return the last ``#### N`` of a response, without separators, currency, percent sign or trailing zeros.

    None if there is none. Fractions stay fractions, in lowest terms.
    """
    found = list(_MARKED.finditer(text))
    if len(found) > 1:
        found = [match for match in found if not match.group(2)]
    return _normalise(found[-1].group(1)) if found else None


def extract_flexible(text: str) -> str | None:
    """Return the answer by the first of these that occurs: ``####``, ``\\boxed``, "the answer is", the last number."""
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
    """Return the gold answer of a GSM8K solution (``... #### N``) or of a bare number; None if it is neither."""
    marked = extract(text)
    if marked is not None:
        return marked
    bare = _BARE.fullmatch(text)
    return _normalise(bare.group(1)) if bare else None


def is_correct(extracted: str | None, gold: str) -> bool:
    """Return True if an extracted answer equals the gold answer as a number."""
    answer = gold_answer(gold)
    return extracted is not None and answer is not None and Fraction(extracted) == Fraction(answer)


def _boxed(text: str, numbers: Sequence[int]) -> str | None:
    """Return the number in the last ``\\boxed{...}`` that has one; the box may lack its end.

    ``numbers`` has the positions at which the text's numbers begin.
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
    """Return the number at a position, or the result of the calculation there."""
    found = _SUM.match(text, start, end) or _FIND.match(text, start, end)
    return found.group(found.lastindex or 0) if found else ""  # the group of a calculation is its result


def _plain(fraction: re.Match[str]) -> str:
    """Write LaTeX's ``2\\frac{1}{2}`` as ``5/2``."""
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
    except (ArithmeticError, ValueError):  # two signs, or a division by zero
        return None
