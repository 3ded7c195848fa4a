"""Signs of degenerate text: what a collapsing policy writes."""

import re
from collections.abc import Hashable, Sequence

LONGEST_PERIOD = 32
_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words, numbers and punctuation marks, whatever the tokenizer."""
    return _WORD.findall(text)


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of n-grams that were there before in the same text (seq-rep-n; Welleck et al., arXiv 1908.04319).

    0 where there are fewer than two n-grams.
    """
    grams = _ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def longest_run(tokens: Sequence[Hashable], longest_period: int = LONGEST_PERIOD) -> int:
    """Tokens in the longest stretch that repeats a block of at most ``longest_period`` tokens at once.

    ``a b a b a b`` has 6, a text without a repeated neighbour 0.
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
    """Different n-grams over all n-grams of many texts (distinct-n; Li et al., arXiv 1510.03055); 0 without any."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
