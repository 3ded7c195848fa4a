"""GSM8K answers: extraction and equality."""

import re
from decimal import Decimal, InvalidOperation

_NUMBER = r"-?\$?\s*-?\d[\d,]*(?:\.\d+)?"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_BARE = re.compile(rf"\s*({_NUMBER})\s*")


def extract(text: str) -> str | None:
    """The last ``#### N`` of a response, normalised: no thousands separators, no currency sign, no trailing zeros.

    Returns None where there is none.
    """
    found = _MARKED.findall(text)
    return _normalise(found[-1]) if found else None


def gold_answer(text: str) -> str | None:
    """The gold answer of a GSM8K solution (``... #### N``), or of a bare number."""
    marked = extract(text)
    if marked is not None:
        return marked
    bare = _BARE.fullmatch(text)
    return _normalise(bare.group(1)) if bare else None


def is_correct(extracted: str | None, gold: str) -> bool:
    """Whether an extracted answer equals the gold answer as a number."""
    return extracted is not None and extracted == gold_answer(gold)


def _normalise(number: str) -> str | None:
    try:
        value = Decimal(re.sub(r"[\s$,]", "", number))
    except InvalidOperation:
        return None
    return f"{value.normalize() + 0:f}"
