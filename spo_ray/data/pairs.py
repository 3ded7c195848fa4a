"""Builds preference pairs from SFT responses and a policy's own wrong samples; appendix B of the paper."""

import math
import os
import random
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

from spo_ray.config.data import PairsConfig
from spo_ray.data.filter import clean_pairs
from spo_ray.data.grade import ROWS_PER_SHARD, Sample, grade_samples, samples_of, samples_stage
from spo_ray.data.sample import SamplingJob, sample
from spo_ray.errors import RowRejectedError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, require_rows
from spo_ray.runtime.map_rows import Mapper, Row, each_row, map_shards
from spo_ray.runtime.run import Run, Stage, Work, times


def preference_pairs(run: Run, policy: Artifact, questions: Artifact, suffix: str = "") -> Artifact:
    """Sample a policy, and pair SFT responses with its wrong samples (:class:`schema.Pair`), without duplicates."""
    name = suffix.removeprefix("_") or run.config.reference
    samples = sample(run, f"{name}_samples", SamplingJob.policy(run.config, policy), questions)
    scored = grade_samples(run, f"{name}_scores", samples)
    return clean_pairs(run, f"pairs{suffix}", pair_samples(run, f"pair_candidates{suffix}", scored))


def pair_samples(run: Run, name: str, scored: Artifact) -> Artifact:
    """Pair SFT responses with wrong samples of the same question (:class:`schema.Pair`)."""
    config, seed = run.config.pairs, run.config.seed

    def build(out: Path, counts: RowCounts) -> None:
        pairer = partial(_pairer, config, seed, samples_stage(scored))
        map_shards(name, scored, out, counts, mapper=pairer, kind=schema.Pair, batch_size=ROWS_PER_SHARD)
        require_rows(Artifact(out, "").count, "preference pairs: no question has a wrong, finished sample", counts)

    settings = config.model_dump(include={"per_question", "select"})
    bound = scored.max_rows
    work = Work(bound, times(bound, config.per_question), cpus=1, note=f"wrong samples by {config.select}")
    return run.execute(Stage(name, build, settings, {"scored": scored}, work, resumable=True))


def wrong_against_sft(
    responses: Sequence[str], samples: Sequence[Sample], *, select: str, per_question: int, seed: str
) -> list[tuple[int, Sample]]:
    """Return pairs of one question: (index of the SFT response, wrong sample).

    The SFT responses take turns; each takes the remaining wrong sample that ranks highest by ``select``. The samples
    are distinct. Samples that reached the token limit are not used: they are not complete responses of the policy.
    """
    distinct: dict[str, Sample] = {}
    for found in samples:
        if found.finished and not found.correct and found.text.strip():
            distinct.setdefault(found.text.strip(), found)
    left, pairs, rng, key = list(distinct.values()), [], random.Random(seed), SELECTIONS[select]
    while responses and left and len(pairs) < per_question:
        turn = len(pairs) % len(responses)
        ranks = [key(responses[turn], candidate, rng) for candidate in left]
        best = max(range(len(left)), key=lambda i: (ranks[i], -left[i].index))
        pairs.append((turn, left.pop(best)))
    return pairs


def common_prefix(one: str, other: str) -> int:
    """Return the number of characters that two texts have in common at their start."""
    return len(os.path.commonprefix([one, other]))  # noqa: RUF071 (characters are meant, no path's parts)


Key = Callable[[str, Sample, random.Random], float]
"""Ranks (chosen response, wrong sample, random generator); the pair with the highest rank is made first."""


SELECTIONS: dict[str, Key] = {
    "random": lambda chosen, sample, rng: rng.random(),
    # The most probable samples first; samples of unknown probability last.
    "hardest": lambda chosen, sample, rng: -math.inf if sample.logp is None else sample.logp,
    # The most similar samples first, by the share of words in common blocks (Ratcliff and Obershelp).
    "nearest": lambda chosen, sample, rng: SequenceMatcher(
        None, chosen.split(), sample.text.split(), autojunk=False
    ).ratio(),
    "longest_common_prefix": lambda chosen, sample, rng: common_prefix(chosen, sample.text),
}


def _pairer(config: PairsConfig, seed: int, stage: str) -> Mapper:
    def pair(row: Row) -> list[Row]:
        found = wrong_against_sft(
            row["responses"],
            samples_of(row),
            select=config.select,
            per_question=config.per_question,
            seed=f"{seed}:{row['id']}",
        )
        if not found:
            raise RowRejectedError("no wrong sample with an end token")
        return [
            {
                "id": f"{row['id']}-{i}",
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": row["responses"][turn],
                "rejected": sample.text.strip(),
                "source_id": row["id"],
                "chosen_source": row["response_sources"][turn],
                "rejected_source": f"{stage}:{sample.index}",
            }
            for i, (turn, sample) in enumerate(found)
        ]

    return each_row(pair)
