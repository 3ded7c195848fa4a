"""The sweep page: one self-contained HTML file, its figures as SVG, and ``summary.json``."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median_high
from typing import Any

from spo_ray.config.sweep import names_of
from spo_ray.evaluate.evaluations import Evaluation
from spo_ray.evaluate.statistics import in_words
from spo_ray.report.figures import spec, svg
from spo_ray.report.page import Table, render
from spo_ray.report.scores import with_interval
from spo_ray.report.summary import UNMEASURED, figures, origin
from spo_ray.report.sweep_figures import importances, sensitivity_figures
from spo_ray.runtime.artifact import Artifact, RowCounts, versions, write_json
from spo_ray.runtime.console import log, place
from spo_ray.runtime.run import Run, Stage, Work
from spo_ray.sweep.results import BEST, Ranked, Row, rows_of
from spo_ray.sweep.space import short_names, short_text, sweep_of


def write_sweep_report(run: Run, trials: Artifact, best: Ranked, tested: Evaluation = UNMEASURED) -> None:
    """Write ``report/index.html`` with its figures, and ``summary.json``."""
    rows = rows_of(trials)
    summary = cache(partial(summarise_sweep, run, rows, best, tested))

    def build(out: Path, row_counts: RowCounts) -> None:
        drawn = sensitivity_figures(rows, sweep_of(run.config), summary()["importances"])
        for title, chart in drawn:
            name = re.sub(r"[^a-z0-9.-]+", "_", title.lower())  # names of scores and parameters hold any character
            (out / f"{name}.svg").write_text(svg(chart), encoding="utf-8")
        page = render(
            "sweep.html.j2", **_content(run, rows, summary()), figures=[(t, spec(chart)) for t, chart in drawn]
        )
        (out / "index.html").write_text(page, encoding="utf-8")
        row_counts.read = row_counts.kept = len(rows)

    inputs = {"trials": trials, "scores": tested.scores, "comparisons": tested.comparisons}
    report = run.execute(Stage("report", build, {}, inputs, Work(note="a page")))
    if run.mode == "plan":
        return
    write_json(run.root / "summary.json", summary())
    log("best", f"{values_in_words(best.values)}; {BEST} is ready to run")
    for line in _test_lines(summary()):
        log("test", " ".join(line))
    log("report", place(report.path / "index.html"))


def summarise_sweep(run: Run, rows: Sequence[Row], best: Ranked, tested: Evaluation) -> dict[str, Any]:
    """Return the content of ``summary.json``; ``test`` holds scores on the test split by checkpoint and name."""
    sweep, test = sweep_of(run.config), {}
    for score in tested.scores.rows():
        name = score["metric"] if score["suite"] == "accuracy" else f"{score['suite']}/{score['metric']}"
        test.setdefault(score["checkpoint"], {})[name] = figures(score)
    status = [row["status"] for row in rows]
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
        "comparisons": tested.comparisons.rows(),
        "importances": importances(rows, sweep),
        "bytes": {
            "trials": sum(row["bytes"] for row in rows),
            "without_checkpoint": median_high(without) if without else None,
        },
        "versions": versions(),
    }


def _content(run: Run, rows: Sequence[Row], summary: dict[str, Any]) -> dict[str, Any]:
    """Return the data of ``sweep.html.j2`` except the figures."""
    sweep, means = sweep_of(run.config), summary["best"]["validation"]
    validation = ["validation", *(f"{mean:.4g}" for mean in means.values())]
    test = [[f"test, {line[0]}", *line[1:]] for line in _test_lines(summary)]
    return {
        "config": run.config,
        "origin": origin(run),
        "sweep": sweep,
        "summary": summary,
        "versions": summary["versions"],
        "best": values_in_words(summary["best"]["values"]),
        "best_file": BEST,
        "scores": Table(["on", *means], [validation, *test]),
        "tests": [f"Test split, {row['metric']}: {in_words(row)}." for row in summary["comparisons"]],
        "trials": _trial_table(rows, sweep.space),
    }


def _test_lines(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return checkpoints with their values of the objectives on the test split."""
    names = summary["best"]["validation"]
    return [[n, *(with_interval(own.get(key), ".3f") for key in names)] for n, own in summary["test"].items()]


def _trial_table(rows: Sequence[Row], space: Iterable[str]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    header = ["trial", *short_names(space).values(), "seed", "status", "steps", "seconds", "bytes", *names]
    lines = []
    for row in rows:
        status = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
        values = [row["trial"], *(short_text(row["values"].get(key)) for key in space), str(row["seed"]), status]
        counts = [str(row["steps"]), f"{row['seconds']:.0f}", f"{row['bytes']:,}"]
        lines.append([*values, *counts, *(with_interval(row["scores"].get(name), ".3f") for name in names)])
    return Table(header, lines)


def values_in_words(values: Mapping[str, Any]) -> str:
    """Return a point of the search space as text."""
    return ", ".join(f"{key} = {short_text(value)}" for key, value in values.items())
