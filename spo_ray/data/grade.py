"""Grades samples, and holds what the stages after grading share. It imports no torch, so its tasks start quickly."""

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from spo_ray.data.verifiers import load_verifier, verifier_identity, verifier_of
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts
from spo_ray.runtime.map_rows import Mapper, Row, each_row, map_shards
from spo_ray.runtime.run import Run, Stage, Work

ROWS_PER_SHARD = 2000
"""Rows per file and call in stages that grade, pair or tokenise."""


class Sample(NamedTuple):
    """One graded sample of a question."""

    index: int
    """Number of the sample in its stage, from 0."""
    text: str
    logp: float | None
    """Log-probability, summed over the tokens, in nats; None: unknown."""
    correct: bool
    finished: bool
    """True if it ended with the end-of-turn token."""


def grade_samples(run: Run, name: str, samples: Artifact) -> Artifact:
    """Strip samples by ``sft_data.strip`` and grade them (:class:`schema.Scored`); the manifest has the mean pass@k."""
    verifier, patterns = verifier_of(run.config.data), run.config.sft_data.strip

    def build(out: Path, row_counts: RowCounts) -> None:
        grader = partial(_grader, verifier, patterns)
        map_shards(name, samples, out, row_counts, mapper=grader, kind=schema.Scored, batch_size=ROWS_PER_SHARD)
        counts = [(len(correct), sum(correct)) for correct in Artifact(out, "").column("correct") if correct]
        for k in (1, 2, 4, 8, 16, 32, 64):
            if counts and k <= min(n for n, _ in counts):
                row_counts.facts[f"pass@{k}"] = sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)

    settings = {"verifier": verifier_identity(verifier), "strip": patterns}
    work = Work(samples.max_rows, cpus=1, note="graded samples")
    return run.execute(Stage(name, build, settings, {"samples": samples}, work, resumable=True))


def samples_of(row: Row) -> list[Sample]:
    """Return the samples of a row (:class:`schema.Scored`)."""
    columns = (row[key] for key in ("samples", "sample_logps", "correct", "finished"))
    return [Sample(i, *values) for i, values in enumerate(zip(*columns, strict=True))]


def samples_stage(scored: Artifact) -> str:
    """Return the name of the stage whose samples were graded."""
    return scored.path.name.replace("_scores", "_samples")


def strip(text: str, patterns: Sequence[str]) -> str:
    """Remove whatever the regular expressions match; ``.`` also matches line breaks."""
    for pattern in patterns:
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    return text


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of pass@k from ``n`` samples; Chen et al., arXiv 2107.03374, equation 1.

    Raises:
        ValueError: fewer than ``k`` samples.
    """
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def _grader(name: str, patterns: Sequence[str]) -> Mapper:
    verifier = load_verifier(name)

    def grade(row: Row) -> list[Row]:
        texts = [strip(text, patterns) for text in row["samples"]]
        grades = [verifier.grade(text, row["gold"]) for text in texts]
        columns = zip(*grades, strict=True) if grades else ((), (), ())
        named = dict(zip(("extracted", "correct", "strict"), map(list, columns), strict=True))
        return [row | {"samples": texts} | named]

    return each_row(grade)
