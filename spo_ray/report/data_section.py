"""The report's sections on the data: training pairs, and dropped rows."""

from collections import Counter
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from spo_ray.core.text_metrics import words_and_marks
from spo_ray.data.filter import Contamination
from spo_ray.report import html
from spo_ray.runtime.artifact import MANIFEST, REJECTED, Artifact, RowCounts
from spo_ray.runtime.run import Run

SHOWN_DROPPED = 20
"""Rows of a stage that the page lists for each reason."""
SHARED_WORDS = 13
"""In a row, with a held-out prompt: a sign of contamination."""


def pairs_section(run: Run, pairs: Artifact, held_out: Artifact) -> Iterator[str]:
    """Length bias, duplicates and contamination of the training pairs."""
    table = pairs.rows()
    chosen, rejected = ([len(words_and_marks(row[side])) for row in table] for side in ("chosen", "rejected"))
    longer = sum(one > other for one, other in zip(chosen, rejected, strict=True)) / len(table)
    copies = Counter((str(row["prompt"]), row["chosen"], row["rejected"]) for row in table)
    counts = RowCounts()
    template = getattr(run.config.data, "prompt", "")
    clean = list(Contamination(held_out.rows(), SHARED_WORDS, template).keep_clean(table, counts))
    link = html.link(f"{len(table)}", f"../{pairs.path.name}/")
    lines: list[list[str]] = [
        ["pairs", link],
        ["mean words, chosen", f"{fmean(chosen):.1f}"],
        ["mean words, rejected", f"{fmean(rejected):.1f}"],
        ["chosen longer than rejected", f"{longer:.1%}"],
        ["prompts", f"{len({str(row['prompt']) for row in table})}"],
        ["exact duplicates", f"{len(table) - len(copies)}"],
        [f"sharing {SHARED_WORDS} words in a row, or all, with a held-out prompt", f"{len(table) - len(clean)}"],
    ]
    yield "<h2>Training pairs</h2>"
    yield html.table(["", ""], lines)


def ledger_section(run: Run) -> Iterator[str]:
    """The drop counts: for each stage and reason the first rows, and where the others are."""
    title = "<h2>Dropped rows</h2>"
    for file in sorted(run.root.glob(f"*/{REJECTED}"), key=lambda path: (path.parent / MANIFEST).stat().st_mtime):
        by_reason: dict[str, list[list[str]]] = {}
        for row in pq.read_table(file).to_pylist():
            by_reason.setdefault(row["reason"], []).append([row["id"], row["excerpt"]])
        for reason, found in by_reason.items():
            yield title
            title = ""
            yield html.details(*_dropped(file.parent.name, reason, found))


def _dropped(stage: str, reason: str, found: list[Any]) -> tuple[str, str]:
    shown = found[:SHOWN_DROPPED]
    more = "" if shown == found else f"; the first {len(shown)} of them, all in {stage}/{REJECTED}"
    return f"{stage}: {len(found)} {reason}{more}", html.table(["row", "excerpt"], shown, words=1)
