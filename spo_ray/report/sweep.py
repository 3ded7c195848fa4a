"""The sensitivity report: one self-contained page, its figures, and the table of the trials."""

import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from html import escape
from pathlib import Path
from typing import Any

from spo_ray.config.sweep import SweepConfig, names_of
from spo_ray.evaluate.evaluations import Evaluation
from spo_ray.evaluate.statistics import in_words
from spo_ray.report import html
from spo_ray.report.figures import spec, svg
from spo_ray.report.sweep_figures import (
    heat_figure,
    importance_figure,
    importances,
    parallel_figure,
    sensitivity_figure,
)
from spo_ray.runtime.artifact import Artifact, RowCounts, versions, write_json
from spo_ray.runtime.console import log, place
from spo_ray.runtime.run import Run, Stage, Work
from spo_ray.sweep.results import BEST, Ranked, Row, one_each, rows_of
from spo_ray.sweep.space import short_names, short_text, sweep_of

MOST_MAPS = 6


def write_sweep_report(run: Run, trials: Artifact, best: Ranked, tested: Evaluation | None) -> None:
    """Write ``report/index.html`` with the figures beside it, and ``summary.json``."""
    sweep, rows = sweep_of(run.config), rows_of(trials)
    found = cache(partial(summarise, run, rows, best, tested))

    def build(out: Path, row_counts: RowCounts) -> None:
        summary = found()
        figures = dict(sensitivity_figures(rows, sweep, summary["importances"]))
        for title, chart in figures.items():
            (out / file_name(title)).write_text(svg(chart), encoding="utf-8")
        (out / "index.html").write_text(_page(run, rows, summary, figures), encoding="utf-8")
        row_counts.read = row_counts.kept = len(rows)

    inputs = {"trials": trials} | ({"scores": tested.scores, "comparisons": tested.comparisons} if tested else {})
    report = run.execute(Stage("report", build, {}, inputs, Work(note="a page")))
    if run.mode == "plan":
        return
    summary = found()
    write_json(run.root / "summary.json", summary)
    log("best", f"{values_in_words(best.values)}; {BEST} is ready to run")
    for line in _test_lines(summary["test"], names_of(sweep)):
        log("test", " ".join(line))
    log("report", place(report.path / "index.html"))


def file_name(title: str) -> str:
    """A figure's, whatever the names of scores and parameters in its title."""
    return f"{re.sub(r'[^a-z0-9.-]+', '_', title.lower())}.svg"


def summarise(run: Run, rows: Sequence[Row], best: Ranked, tested: Evaluation | None) -> dict[str, Any]:
    """What ``summary.json`` has."""
    sweep = sweep_of(run.config)
    status = [row["status"] for row in rows]
    return {
        "run": run.config.name,
        "seed": run.config.seed,
        "trials": {name: status.count(name) for name in ("finished", "stopped", "failed")},
        "best": {
            "values": best.values,
            "trials": [row["trial"] for row in best.rows],
            "validation": dict(zip(names_of(sweep), best.means, strict=False)),
        },
        "test": _tested(tested),
        "comparisons": tested.comparisons.rows() if tested else [],
        "importances": importances(rows, sweep),
        "bytes": {"trials": sum(row["bytes"] for row in rows), "without_checkpoint": _median_bytes(rows)},
        "versions": versions(),
    }


def _tested(tested: Evaluation | None) -> dict[str, dict[str, Any]]:
    """Scores on the test split by checkpoint, then by name."""
    found: dict[str, dict[str, Any]] = {}
    for score in tested.scores.rows() if tested else []:
        name = score["metric"] if score["suite"] == "accuracy" else f"{score['suite']}/{score['metric']}"
        entry = {key: score[key] for key in ("value", "low", "high", "n") if score[key] is not None}
        found.setdefault(score["checkpoint"], {})[name] = entry
    return found


def _median_bytes(rows: Sequence[Row]) -> int | None:
    sizes = sorted(row["bytes"] for row in rows if not row["checkpoint"])
    return sizes[len(sizes) // 2] if sizes else None


def sensitivity_figures(rows: Sequence[Row], sweep: SweepConfig, found: dict[str, float]) -> list[tuple[str, Any]]:
    """The first objective against each parameter and pair of them, all parameters at once, and importances."""
    objective, names = names_of(sweep)[0], short_names(sweep.space)
    scored = one_each(row for row in rows if objective in row["scores"])
    figures = [(f"{objective} against {name}", sensitivity_figure(scored, key, sweep)) for key, name in names.items()]
    for first, second in list(itertools.combinations(sweep.space, 2))[:MOST_MAPS]:
        figures.append((f"{names[first]} x {names[second]}", heat_figure(scored, first, second, sweep)))
    figures.append(("Parallel coordinates", parallel_figure(scored, sweep)))
    if found:
        figures.append(("Importance", importance_figure(found)))
    return figures


def _page(run: Run, rows: Sequence[Row], summary: dict[str, Any], figures: Mapping[str, Any]) -> str:
    sweep, counts = sweep_of(run.config), summary["trials"]
    told = ", ".join(f"{n} {name}" for name, n in counts.items())
    sections = [
        f"<h1>{escape(run.config.name)}</h1>",
        f"<p class=note>{len(rows)} trials of {escape(sweep.method)}: {told}. Searcher {sweep.searcher.type}, "
        f"scheduler {sweep.scheduler.type}, seeds {', '.join(map(str, sweep.seeds))}. Scored on "
        f"{_validation(run, sweep)}, which no trial was trained on.</p>",
        "<h2>Best</h2>",
        f"<p>{escape(values_in_words(summary['best']['values']))}. Ready to run: <code>{BEST}</code>.</p>",
        html.table(["on", *names_of(sweep)], _best_lines(summary, sweep)),
        *(f"<p class=note>Test split, {row['metric']}: {escape(in_words(row))}.</p>" for row in summary["comparisons"]),
        "<h2>Sensitivity</h2>",
        "<p class=note>A point is one setting: the mean over its seeds with the 95% interval (Student's t over seeds; "
        "with one seed the interval of the score itself). Hollow: not all of its trials reached the end, and their "
        "last score is shown. Heat maps average over everything else.</p>",
    ]
    for title, chart in figures.items():
        sections += [f"<h3>{escape(title)}</h3>", html.figure(spec(chart))]
    sections += ["<h2>Trials</h2>", html.table(*_trial_table(rows, sweep))]
    footer = " · ".join(f"{k} {v}" for k, v in summary["versions"].items())
    return html.page(f"{run.config.name}: spo_ray sweep", sections, footer)


def _validation(run: Run, sweep: SweepConfig) -> str:
    questions = "" if run.config.data.type == "preference" else f"{sweep.validation.questions} validation questions"
    pairs = f"{sweep.validation.pairs} held-out pairs" if sweep.validation.pairs else ""
    return " and ".join(part for part in (questions, pairs) if part) or "the probe pairs"


def _best_lines(summary: Mapping[str, Any], sweep: SweepConfig) -> list[list[str]]:
    lines = [["validation", *(f"{value:.4g}" for value in summary["best"]["validation"].values())]]
    lines += [[f"test, {line[0]}", *line[1:]] for line in _test_lines(summary["test"], names_of(sweep))]
    return [line + [""] * (1 + len(sweep.objectives) - len(line)) for line in lines]


def _test_lines(tested: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    return [[name, *(_with_interval(entry.get(key)) for key in names)] for name, entry in tested.items()]


def _trial_table(rows: Sequence[Row], sweep: SweepConfig) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    header = ["trial", *short_names(sweep.space).values(), "seed", "status", "steps", "seconds", "bytes", *names]
    lines = []
    for row in rows:
        values = [short_text(row["values"].get(key)) for key in sweep.space]
        status = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
        plain = [str(row["seed"]), status, str(row["steps"]), f"{row['seconds']:.0f}", f"{row['bytes']:,}"]
        lines.append([row["trial"], *values, *plain, *(_with_interval(row["scores"].get(name)) for name in names)])
    return header, lines


def _with_interval(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    interval = f" ({entry['low']:.3f} – {entry['high']:.3f})" if "low" in entry else ""
    return f"{entry['value']:.3f}{interval}"


def values_in_words(values: Mapping[str, Any]) -> str:
    """A point of the search space."""
    return ", ".join(f"{key} {short_text(value)}" for key, value in values.items())
