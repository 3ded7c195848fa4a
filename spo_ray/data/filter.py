"""Rows that should not be trained on: test questions in disguise, duplicates, lopsided pairs."""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from spo_ray.config.data import PairsConfig
from spo_ray.errors import UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, require_rows, write_rows
from spo_ray.runtime.run import Run, Stage, Work

NEAR = 0.9
"""Jaccard similarity of word triples from which on two pairs are near duplicates: few words differ."""
PERMUTATIONS = 128


def clean_pairs(run: Run, name: str, candidates: Artifact) -> Artifact:
    """The pairs that are kept (:class:`schema.Pair`): no duplicates, and sides of comparable length as configured."""
    config = run.config.pairs

    def build(out: Path, counts: RowCounts) -> None:
        seen = DUPLICATES[config.dedup](config)
        for part in candidates.parts:  # one after another: whether a pair was there before depends on all of them
            kept = []
            for row in pq.read_table(part).to_pylist():
                counts.read += 1
                reason = _lopsided(row, config.max_length_ratio)
                first = None if reason else seen.earlier(row["id"], _text(row))
                if reason:
                    counts.reject(row["id"], reason, row)
                elif first:
                    counts.reject(row["id"], seen.reason, f"{first}: {row}")
                else:
                    kept.append(row)
            write_rows(out / Path(part).name, kept, schema.Pair)
            counts.kept += len(kept)
        require_rows(counts.kept, "pairs left by pairs.dedup and pairs.max_length_ratio", counts)

    settings = config.model_dump(include={"dedup", "max_length_ratio"}) | {"near_threshold": NEAR}
    work = Work(candidates.max_rows, note=f"pairs without duplicates (dedup {config.dedup})")
    return run.execute(Stage(name, build, settings, {"candidates": candidates}, work))


def _lopsided(row: Any, limit: float | None) -> str | None:
    short, long = sorted((len(row["chosen"]), len(row["rejected"])))
    return f"lengths differ by more than pairs.max_length_ratio={limit}" if limit and long > limit * short else None


def _text(row: Any) -> str:
    return "\n".join([*(turn["content"] for turn in row["prompt"]), row["chosen"], row["rejected"]])


class _AllDifferent:
    def __init__(self, config: PairsConfig) -> None:
        self.ids: dict[bytes, str] = {}

    def earlier(self, row_id: str, text: str) -> str | None:
        """The row in which the text was there before; None remembers it."""
        return None


class _Exact(_AllDifferent):
    reason = "duplicate"

    def earlier(self, row_id: str, text: str) -> str | None:
        first = self.ids.setdefault(hashlib.sha256(self.form(text).encode()).digest()[:16], row_id)
        return None if first == row_id else first

    def form(self, text: str) -> str:
        return text


class _Normalised(_Exact):
    def form(self, text: str) -> str:
        return " ".join(words(text))


class _Near:
    reason = "near duplicate"

    def __init__(self, config: PairsConfig) -> None:
        from datasketch import MinHashLSH  # needs SciPy, which takes a second

        self.index: Any = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
        self.sketches: dict[str, Any] = {}

    def earlier(self, row_id: str, text: str) -> str | None:
        from datasketch import MinHash

        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([" ".join(shingle).encode() for shingle in shingles(words(text), 3)])
        found = self.index.query(sketch)  # candidates: the estimate decides
        alike = [other for other in found if sketch.jaccard(self.sketches[other]) >= NEAR]
        if alike:
            return min(alike)
        self.index.insert(row_id, sketch)
        self.sketches[row_id] = sketch
        return None


DUPLICATES: dict[str, type[Any]] = {"none": _AllDifferent, "exact": _Exact, "normalised": _Normalised, "near": _Near}


class Contamination:
    """Finds prompts that share ``n`` words in a row with one of ``others`` (or all words, where those are fewer)."""

    def __init__(self, others: Iterable[Any], n: int, template: str = "") -> None:
        """``template`` is what all questions are put into: it says nothing about them, and is left out."""
        self.n = n
        self.ends = template.split("{question}") if template else ["", ""]
        self.known: dict[int, str] = {}
        for row in others:
            for shingle in shingles(words(self.text(row)), n):
                self.known.setdefault(hash(shingle), row["id"])

    def text(self, row: Any) -> str:
        """What a user asks: the question by itself, or the user's messages."""
        if isinstance(row["prompt"], str):
            return row["prompt"].removeprefix(self.ends[0]).removesuffix(self.ends[-1])
        return "\n".join(turn["content"] for turn in row["prompt"] if turn["role"] == "user")

    def keep_clean(self, table: Iterable[Any], counts: RowCounts) -> Iterator[Any]:
        """The rows that share nothing; the others go to the counts with the row that they share it with."""
        for row in table:
            hits = (self.known.get(hash(shingle)) for shingle in shingles(words(self.text(row)), self.n))
            other = next((hit for hit in hits if hit is not None), None)
            if other is None:
                yield row
            else:
                counts.reject(row["id"], f"shares {self.n} words in a row with a test prompt", f"{other}: {row}")


def words(text: str) -> list[str]:
    """Words and numbers in lower case."""
    return re.findall(r"\w+", text.casefold())


def shingles(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of ``n`` items; the whole where there are fewer, and nothing of nothing."""
    if not items:
        return []
    return [tuple(items[i : i + n]) for i in range(max(1, len(items) - n + 1))]


def hold_out(run: Run, source: Artifact, what: str, count: int, kind: Any) -> tuple[Artifact, Artifact]:
    """(rows to train on, validation rows): a random part, drawn from the seed, with all rows of a prompt together.

    Raises:
        UserError: nothing would be left to train on.
    """

    def part(name: str, inside: bool) -> Artifact:
        def build(out: Path, counts: RowCounts) -> None:
            table, names = source.rows(), {}
            groups = [names.setdefault(json.dumps(row["prompt"]), row.get("source_id") or row["id"]) for row in table]
            different = sorted(set(groups))
            if count >= len(different):
                raise UserError(
                    f"sweep.validation.{what}={count} leaves none of {len(different)} to train on: lower it"
                )
            drawn = set(random.Random(f"validation-{run.config.seed}").sample(different, count))
            kept = [row for row, group in zip(table, groups, strict=True) if (group in drawn) == inside]
            counts.read, counts.kept = len(table), len(kept)
            write_rows(out / "part-0.parquet", kept, kind)

        work = Work(source.max_rows, note=f"{what} for {'validation' if inside else 'training'}")
        return run.execute(Stage(f"{name}_{what}", build, {"count": count}, {"source": source}, work))

    return part("train", False), part("validation", True)
