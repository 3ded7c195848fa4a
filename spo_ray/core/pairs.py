"""Scored samples to SFT responses and to preference pairs; appendix B of the paper."""

import random
from collections.abc import Sequence


def correct_responses(
    gold: str,
    samples: Sequence[str],
    correct: Sequence[bool],
    finished: Sequence[bool],
    *,
    teachers: Sequence[str],
    limit: int,
) -> list[str]:
    """Up to ``limit`` distinct correct responses to one question, by the order of ``teachers``.

    ``samples`` gives the policy's own correct samples that end by themselves, ``gold`` the reference solution.
    """
    sources = {
        "gold": [gold],
        "samples": [s for s, ok, ended in zip(samples, correct, finished, strict=True) if ok and ended],
    }
    found = dict.fromkeys(text.strip() for teacher in teachers for text in sources[teacher])
    return list(found)[:limit]


def wrong_against_sft(
    responses: Sequence[str],
    samples: Sequence[str],
    correct: Sequence[bool],
    finished: Sequence[bool],
    *,
    per_question: int,
    seed: str,
) -> list[tuple[str, str]]:
    """(chosen, rejected) pairs of one question: SFT responses in turn against distinct wrong samples, drawn at random.

    Samples that were cut off at the token limit are no candidates: without their end they are not what the policy
    would say.
    """
    candidates = zip(samples, correct, finished, strict=True)
    wrong = list(dict.fromkeys(s.strip() for s, ok, ended in candidates if ended and not ok and s.strip()))
    rng = random.Random(seed)
    rng.shuffle(wrong)
    return [(responses[i % len(responses)], rejected) for i, rejected in enumerate(wrong[:per_question])]
