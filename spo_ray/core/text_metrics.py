"""Measures of degenerate text, as a collapsing policy writes it."""

import re
from collections.abc import Hashable, Sequence

LONGEST_PERIOD = 32
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


def words_and_marks(text: str) -> list[str]:
    """Split text into words, numbers and punctuation marks, which collapsed text repeats too."""
    return _WORD_OR_MARK.findall(text)


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Return the share of n-grams that occur earlier in the text (seq-rep-n; Welleck et al., arXiv 1908.04319).

    0 if there are fewer than two n-grams.
    """
    grams = _ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def longest_run(tokens: Sequence[Hashable], longest_period: int = LONGEST_PERIOD) -> int:
    """Return the length of the longest stretch that repeats a block of at most ``longest_period`` tokens.

    ``a b a b a b`` has 6, a text in which no block follows itself 0.
    """
    best = 0
    for period in range(1, min(longest_period, len(tokens) // 2) + 1):
        equal = 0
        for i in range(period, len(tokens)):
            equal = equal + 1 if tokens[i] == tokens[i - period] else 0
            if equal >= period:
                best = max(best, equal + period)
    return best


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Return distinct over all n-grams of many texts (distinct-n; Li et al., arXiv 1510.03055); 0 without any."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
