"""Graded samples to SFT responses and to preference pairs; appendix B of the paper."""

import random
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple


class Sample(NamedTuple):
    """One graded sample of a question."""

    index: int
    text: str
    logp: float | None
    """Summed log-probability (nats)."""
    correct: bool
    finished: bool


def common_prefix(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


Key = Callable[[str, Sample, random.Random], float]
"""(chosen response, wrong sample, random numbers) to a rank: the pair with the highest is made first."""


def _random(chosen: str, sample: Sample, rng: random.Random) -> float:
    return rng.random()


def _hardest(chosen: str, sample: Sample, rng: random.Random) -> float:
    """The most probable one; last where that is unknown."""
    return -float("inf") if sample.logp is None else sample.logp


def _nearest(chosen: str, sample: Sample, rng: random.Random) -> float:
    """The one most like the chosen response: the share of words in common blocks (Ratcliff and Obershelp)."""
    return SequenceMatcher(None, chosen.split(), sample.text.split(), autojunk=False).ratio()


def _longest_common_prefix(chosen: str, sample: Sample, rng: random.Random) -> float:
    """The one that goes wrong last, in characters."""
    return common_prefix(chosen, sample.text)


SELECTIONS: dict[str, Key] = {
    "random": _random,
    "hardest": _hardest,
    "nearest": _nearest,
    "longest_common_prefix": _longest_common_prefix,
}


def correct_responses(
    found: Sequence[tuple[str, str]],
    gold: str,
    samples: Sequence[Sample],
    *,
    stage: str,
    teachers: Sequence[str],
    limit: int,
) -> list[tuple[str, str]]:
    """Up to ``limit`` distinct correct (response, source) of one question, by the order of ``teachers``.

    Args:
        found: those from teachers before.
        gold: the reference solution, for the teacher ``gold``.
        samples: of a model, for the teacher ``samples``: correct ones that end by themselves.
        stage: what a sample's source is called after.
        teachers: the order.
        limit: how many.
    """
    sources = {
        "gold": [(gold, "gold")],
        "samples": [(s.text, f"{stage}:{s.index}") for s in samples if s.correct and s.finished],
    }
    texts: dict[str, str] = {}
    for text, source in (*found, *(pair for teacher in teachers for pair in sources[teacher])):
        if text.strip():
            texts.setdefault(text.strip(), source)
    return list(texts.items())[:limit]


def wrong_against_sft(
    responses: Sequence[str], samples: Sequence[Sample], *, select: str, per_question: int, seed: str
) -> list[tuple[int, Sample]]:
    """Pairs of one question: (index of the SFT response, wrong sample).

    SFT responses take turns, and each takes the best wrong sample that is left by ``select``. Samples are distinct.
    Those that were cut off at the token limit are no candidates: without their end they are not what the policy would
    say.
    """
    distinct: dict[str, Sample] = {}
    for sample in samples:
        if sample.finished and not sample.correct and sample.text.strip():
            distinct.setdefault(sample.text.strip(), sample)
    left, pairs, rng, key = list(distinct.values()), [], random.Random(seed), SELECTIONS[select]
    while responses and left and len(pairs) < per_question:
        turn = len(pairs) % len(responses)
        ranks = [key(responses[turn], sample, rng) for sample in left]
        best = max(range(len(left)), key=lambda i: (ranks[i], -left[i].index))
        pairs.append((turn, left.pop(best)))
    return pairs
