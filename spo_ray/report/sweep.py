"""The sweep page: one self-contained HTML file, its figures as SVG, and ``summary.json``."""

import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median_high
from typing import Any

from spo_ray.config.sweep import SweepConfig, names_of
from spo_ray.evaluate.evaluations import Evaluation
from spo_ray.evaluate.statistics import in_words
from spo_ray.report.figures import spec, svg
from spo_ray.report.page import Table, render
from spo_ray.report.scores import with_interval
from spo_ray.report.sweep_figures import importances, sensitivity_figures
from spo_ray.runtime.artifact import Artifact, RowCounts, versions, write_json
from spo_ray.runtime.console import log, place
from spo_ray.runtime.run import Run, Stage, Work
from spo_ray.sweep.results import BEST, Ranked, Row, rows_of
from spo_ray.sweep.space import short_names, short_text, sweep_of


def write_sweep_report(run: Run, trials: Artifact, best: Ranked, tested: Evaluation | None) -> None:
    """Write ``report/index.html`` with its figures, and ``summary.json``."""
    sweep, rows = sweep_of(run.config), rows_of(trials)
    found = cache(partial(summarise, run, rows, best, tested))

    def build(out: Path, row_counts: RowCounts) -> None:
        summary = found()
        figures = dict(sensitivity_figures(rows, sweep, summary["importances"]))
        for title, chart in figures.items():
            (out / file_name(title)).write_text(svg(chart), encoding="utf-8")
        page = render("sweep.html.j2", **_content(run, rows, summary, figures))
        (out / "index.html").write_text(page, encoding="utf-8")
        row_counts.read = row_counts.kept = len(rows)

    inputs = {"trials": trials} | ({"scores": tested.scores, "comparisons": tested.comparisons} if tested else {})
    report = run.execute(Stage("report", build, {}, inputs, Work(note="a page")))
    if run.mode == "plan":
        return
    summary = found()
    write_json(run.root / "summary.json", summary)
    log("best", f"{values_in_words(best.values)}; {BEST} is ready to run")
    for line in _test_lines(summary, names_of(sweep)):
        log("test", " ".join(line))
    log("report", place(report.path / "index.html"))


def file_name(title: str) -> str:
    """Return the file name of a figure; names of scores and parameters in its title can hold any character."""
    return f"{re.sub(r'[^a-z0-9.-]+', '_', title.lower())}.svg"


def summarise(run: Run, rows: Sequence[Row], best: Ranked, tested: Evaluation | None) -> dict[str, Any]:
    """Return the content of ``summary.json``; ``test`` holds scores on the test split by checkpoint and name."""
    sweep = sweep_of(run.config)
    status = [row["status"] for row in rows]
    test: dict[str, dict[str, Any]] = {}
    for score in tested.scores.rows() if tested else []:
        name = score["metric"] if score["suite"] == "accuracy" else f"{score['suite']}/{score['metric']}"
        entry = {key: score[key] for key in ("value", "low", "high", "n") if score[key] is not None}
        test.setdefault(score["checkpoint"], {})[name] = entry
    without = [row["bytes"] for row in rows if not row["checkpoint"]]
    return {
        "run": run.config.name,
        "seed": run.config.seed,
        "trials": {name: status.count(name) for name in ("finished", "stopped", "failed")},
        "best": {
            "values": best.values,
            "trials": [row["trial"] for row in best.rows],
            "validation": dict(zip(names_of(sweep), best.means, strict=False)),
        },
        "test": test,
        "comparisons": tested.comparisons.rows() if tested else [],
        "importances": importances(rows, sweep),
        "bytes": {
            "trials": sum(row["bytes"] for row in rows),
            "without_checkpoint": median_high(without) if without else None,
        },
        "versions": versions(),
    }


def _content(run: Run, rows: Sequence[Row], summary: dict[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of ``sweep.html.j2``."""
    sweep = sweep_of(run.config)
    return {
        "config": run.config,
        "sweep": sweep,
        "summary": summary,
        "versions": summary["versions"],
        "best": values_in_words(summary["best"]["values"]),
        "best_file": BEST,
        "scores": _best_table(summary, names_of(sweep)),
        "tests": [f"Test split, {row['metric']}: {in_words(row)}." for row in summary["comparisons"]],
        "figures": [(title, spec(chart)) for title, chart in figures.items()],
        "trials": _trial_table(rows, sweep),
    }


def _best_table(summary: Mapping[str, Any], names: Sequence[str]) -> Table:
    found = summary["best"]["validation"]
    validation = ["validation", *(f"{found[name]:.4g}" if name in found else "" for name in names)]
    test = [[f"test, {line[0]}", *line[1:]] for line in _test_lines(summary, names)]
    return Table(["on", *names], [validation, *test])


def _test_lines(summary: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Return checkpoints with their scores on the test split."""
    tested = summary["test"]
    return [[name, *(with_interval(scores.get(key), ".3f") for key in names)] for name, scores in tested.items()]


def _trial_table(rows: Sequence[Row], sweep: SweepConfig) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    header = ["trial", *short_names(sweep.space).values(), "seed", "status", "steps", "seconds", "bytes", *names]
    lines = []
    for row in rows:
        values = [short_text(row["values"].get(key)) for key in sweep.space]
        status = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
        plain = [str(row["seed"]), status, str(row["steps"]), f"{row['seconds']:.0f}", f"{row['bytes']:,}"]
        scores = [with_interval(row["scores"].get(name), ".3f") for name in names]
        lines.append([row["trial"], *values, *plain, *scores])
    return Table(header, lines)


def values_in_words(values: Mapping[str, Any]) -> str:
    """Return a point of the search space as text."""
    return ", ".join(f"{key} {short_text(value)}" for key, value in values.items())
