"""Removes rows that should not be trained on: contamination, duplicates, pairs of very different lengths."""

import hashlib
import json
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from spo_ray.config.data import PairsConfig
from spo_ray.errors import UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, require_rows, write_rows
from spo_ray.runtime.run import Run, Stage, Work

NEAR = 0.9
"""Lowest Jaccard similarity of the word triples of near duplicates, at which few words differ."""
PERMUTATIONS = 128
"""Hash functions of a MinHash sketch."""


def clean_pairs(run: Run, name: str, candidates: Artifact) -> Artifact:
    """Drop pairs whose sides have very different lengths, and duplicates, as configured (:class:`schema.Pair`)."""
    config, with_scores = run.config.pairs, run.config.with_scores

    def build(out: Path, counts: RowCounts) -> None:
        check = pair_check(config, with_scores)
        for part in candidates.parts:  # in order: a pair may be a duplicate of one in an earlier part
            kept = []
            for row in pq.read_table(part).to_pylist():
                counts.read += 1
                reason, other = check(row)
                if reason:
                    counts.reject(row["id"], reason, f"{other}: {row}" if other else row)
                else:
                    kept.append(row)
            write_rows(out / Path(part).name, kept, schema.Pair)
            counts.kept += len(kept)
        require_rows(counts.kept, "pairs left by pairs.dedup and pairs.max_length_ratio", counts)

    settings = config.model_dump(include={"dedup", "max_length_ratio"}) | {"near_threshold": NEAR}
    settings |= {"with_scores": True} if with_scores else {}
    work = Work(candidates.max_rows, note=f"pairs without duplicates (dedup {config.dedup})")
    return run.execute(Stage(name, build, settings, {"candidates": candidates}, work))


def pair_check(config: PairsConfig, with_scores: Sequence[str] = ()) -> Callable[[Any], tuple[str, str]]:
    """Return a function of pairs, taken in order: why a pair is dropped, and the id of the pair that it duplicates.

    Both are empty for a pair that is kept. ``with_scores`` names the methods that need the pairs' scores.
    """
    near, limit = config.dedup == "near", config.max_length_ratio
    find = _near_duplicates() if near else _duplicates(KEYS[config.dedup])

    def check(row: Any) -> tuple[str, str]:
        if with_scores and row.get("score_gap") is None:
            return (
                f"no numbers in 'score_chosen' and 'score_rejected', which the loss of {', '.join(with_scores)} reads",
                "",
            )
        short, long = sorted((len(row["chosen"]), len(row["rejected"])))
        if limit and long > limit * short:
            return f"lengths differ by more than pairs.max_length_ratio={limit}", ""
        first = find(row)
        return ("near duplicate" if near else "duplicate", first) if first else ("", "")

    return check


def without_displacement(run: Run, pairs: Artifact) -> Artifact:
    """Drop the pairs with the highest CHES scores (:class:`schema.ChesPair`), by ``pairs.max_ches_quantile``."""
    share, score = run.config.pairs.max_ches_quantile, run.config.pairs.ches
    if share is None:
        return pairs

    def build(out: Path, counts: RowCounts) -> None:
        table = pairs.rows()
        limit = sorted(row[score] for row in table)[max(1, round(share * len(table))) - 1]
        kept = [row for row in table if row[score] <= limit]
        for row in table:
            if row[score] > limit:
                reason = f"CHES score above the quantile pairs.max_ches_quantile={share}"
                counts.reject(row["id"], reason, f"{row['ches_per_token']:.4g}, the limit is {limit:.4g}")
        counts.read, counts.kept, counts.facts[f"max_{score}"] = len(table), len(kept), limit
        counts.keep_lengths(pairs)
        write_rows(out / "part-0.parquet", kept, schema.ChesPair)

    work = Work(pairs.max_rows, lengths=pairs.lengths, note=f"the {share:.0%} of the pairs with the lowest CHES scores")
    return run.execute(
        Stage(f"{pairs.path.name}_kept", build, {"quantile": share, "score": score}, {"pairs": pairs}, work)
    )


def hold_out(run: Run, source: Artifact, what: str, count: int, kind: Any) -> tuple[Artifact, Artifact]:
    """Return (rows to train on, validation rows): a seeded random split with all rows of a prompt on the same side.

    ``count`` prompts are for validation; ``what`` is ``questions`` or ``pairs``, ``kind`` their row class.

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
            counts.read = counts.kept = len(kept)  # the other part counts the others
            write_rows(out / "part-0.parquet", kept, kind)

        work = Work(source.max_rows, note=f"{what} for {'validation' if inside else 'training'}")
        return run.execute(Stage(f"{name}_{what}", build, {"count": count}, {"source": source}, work))

    return part("train", False), part("validation", True)


class Contamination:
    """Finds prompts that share ``n`` words in a row with a prompt of ``others``, or all words if one has fewer.

    ``template`` is the text around each question, which all prompts share: it is not compared.
    """

    def __init__(self, others: Iterable[Any], n: int, template: str = "") -> None:
        self.n = n
        self.ends = template.split("{question}") if template else ["", ""]
        self.known: dict[int, str] = {}
        for row in others:
            for shingle in self._shingles(row):
                self.known.setdefault(hash(shingle), row["id"])

    def keep_clean(self, table: Iterable[Any], counts: RowCounts) -> Iterator[Any]:
        """Yield the rows that share nothing; the others are quarantined with the row that they share words with."""
        for row in table:
            hits = (self.known.get(hash(shingle)) for shingle in self._shingles(row))
            other = next((hit for hit in hits if hit is not None), None)
            if other is None:
                yield row
            else:
                counts.reject(row["id"], f"shares {self.n} words in a row with a test prompt", f"{other}: {row}")

    def _shingles(self, row: Any) -> list[tuple[str, ...]]:
        """Return the runs of words of the question, or of the user's messages."""
        if isinstance(row["prompt"], str):
            text = row["prompt"].removeprefix(self.ends[0]).removesuffix(self.ends[-1])
        else:
            text = "\n".join(turn["content"] for turn in row["prompt"] if turn["role"] == "user")
        return _shingles(text, self.n)


Finder = Callable[[Any], str | None]
"""Returns the id of an earlier pair that a pair is a duplicate of; None if there is none, and remembers the pair."""


def _duplicates(key: Callable[[Any], str]) -> Finder:
    ids: dict[bytes, str] = {}

    def find(row: Any) -> str | None:
        first = ids.setdefault(hashlib.sha256(key(row).encode()).digest()[:16], row["id"])
        return None if first == row["id"] else first

    return find


def _near_duplicates() -> Finder:
    from datasketch import MinHash, MinHashLSH  # needs SciPy, which takes a second

    index: Any = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
    sketches: dict[str, Any] = {}

    def find(row: Any) -> str | None:
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([" ".join(shingle).encode() for shingle in _shingles(_text(row), 3)])
        # The index returns candidates; the similarity that is estimated from the sketches decides.
        alike = [other for other in index.query(sketch) if sketch.jaccard(sketches[other]) >= NEAR]
        if not alike:
            index.insert(row["id"], sketch)
            sketches[row["id"]] = sketch
        return min(alike, default=None)

    return find


def _text(row: Any) -> str:
    turns = [(turn["content"], turn.get("extra")) for turn in row["prompt"]]
    sides = [(row[side], row.get(f"{side}_extra")) for side in ("chosen", "rejected")]
    return "\n".join(part for said in (*turns, *sides) for part in said if part)


KEYS: dict[str, Callable[[Any], str]] = {
    "none": lambda row: row["id"],
    "exact": _text,
    "normalised": lambda row: " ".join(_text(row).casefold().split()),
}
"""Texts that are equal for duplicates, by ``pairs.dedup``."""


def _words(text: str) -> list[str]:
    """Return the words and numbers of a text in lower case; vowel signs and accents are parts of words."""
    return _word().findall(text.casefold())


@cache
def _word() -> re.Pattern[str]:
    marks = (chr(code) for code in range(sys.maxunicode) if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(rf"[\w{''.join(marks)}]+")


def _shingles(text: str, n: int) -> list[tuple[str, ...]]:
    """Return all runs of ``n`` words; one run of all words if there are fewer, and none if there is no word."""
    words = _words(text)
    return [tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))] if words else []
