"""Results of finished runs and sweeps as Markdown and as CSV."""

import csv
import io
from collections.abc import Mapping

from spo_ray.report import scores
from spo_ray.report.comparison import lines_of
from spo_ray.report.headline import plain
from spo_ray.report.run_page import run_headline
from spo_ray.report.summary import Finished, origin, summarise

FIELDS = ("checkpoint", "suite", "metric", "value", "low", "high", "interval", "std", "n")


def as_markdown(runs: Mapping[str, Finished]) -> str:
    """Return each run's headline and origin, and one table of the results, for a pull request or a model card."""
    told = []
    for label, found in runs.items():
        sentences = "" if found.trials else f"{plain(run_headline(found.run, summarise(found)))} "
        told += [f"**{label}**: {sentences}{origin(found.run)}", ""]
    lines = [{"run": label} | line for label, found in runs.items() for line in lines_of(found)]
    table = scores.results_table(lines, ("run", "method") if len(runs) > 1 else ("method",))
    rule = ["---" if name in ("run", "method") else "---:" for name in table.header]
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (table.header, rule, *table.rows)]
    return "\n".join([*told, *(f"| {' | '.join(row)} |" for row in rows)])


def as_csv(runs: Mapping[str, Finished]) -> str:
    """Return one line for each run, checkpoint and metric, with full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("run", *FIELDS))
    for label, found in runs.items():
        for row in found.evaluation.scores.rows():
            writer.writerow((label, *(row[field] for field in FIELDS)))
    return out.getvalue().rstrip("\n")
