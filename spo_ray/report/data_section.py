"""Tables of the run page on the data: training pairs and dropped rows."""

from collections import Counter
from statistics import fmean

import pyarrow.parquet as pq

from spo_ray.core.text_metrics import words
from spo_ray.data.filter import Contamination
from spo_ray.report.page import Link, Table
from spo_ray.runtime.artifact import MANIFEST, REJECTED, Artifact, RowCounts
from spo_ray.runtime.run import Run

SHOWN_DROPPED = 20
"""Number of dropped rows that the page lists for each stage and reason."""
SHARED_WORDS = 13
"""Number of consecutive words shared with a held-out prompt that count as contamination."""


def pairs_table(run: Run, pairs: Artifact, held_out: Artifact) -> Table:
    """Return length bias, duplicates and contamination of the training pairs."""
    rows = pairs.rows()
    chosen, rejected = ([len(words(row[side])) for row in rows] for side in ("chosen", "rejected"))
    longer = sum(one > other for one, other in zip(chosen, rejected, strict=True)) / len(rows)
    different = Counter((str(row["prompt"]), row["chosen"], row["rejected"]) for row in rows)
    template = getattr(run.config.data, "prompt", "")
    clean = list(Contamination(held_out.rows(), SHARED_WORDS, template).keep_clean(rows, RowCounts()))
    lines = [
        ["pairs", Link(f"{len(rows)}", f"../{pairs.path.name}/")],
        ["mean words, chosen", f"{fmean(chosen):.1f}"],
        ["mean words, rejected", f"{fmean(rejected):.1f}"],
        ["chosen longer than rejected", f"{longer:.1%}"],
        ["different prompts", f"{len({str(row['prompt']) for row in rows})}"],
        ["exact duplicates", f"{len(rows) - len(different)}"],
        [f"sharing {SHARED_WORDS} consecutive words, or all, with a held-out prompt", f"{len(rows) - len(clean)}"],
    ]
    return Table(["", ""], lines)


def dropped_tables(run: Run) -> list[tuple[str, Table]]:
    """Return a title and the first dropped rows for each stage and reason."""
    found = []
    for file in sorted(run.root.glob(f"*/{REJECTED}"), key=lambda path: (path.parent / MANIFEST).stat().st_mtime):
        stage = file.parent.name
        reasons: dict[str, list[list[str]]] = {}
        for row in pq.read_table(file).to_pylist():
            reasons.setdefault(row["reason"], []).append([row["id"], row["excerpt"]])
        for reason, rows in reasons.items():
            shown = rows[:SHOWN_DROPPED]
            more = "" if shown == rows else f"; the first {len(shown)} of them, all in {stage}/{REJECTED}"
            found.append((f"{stage}: {len(rows)} {reason}{more}", Table(["row", "excerpt"], shown)))
    return found
