"""A page that compares finished runs: figures, paired tests, trajectories, settings, and sweeps' sensitivity."""

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from spo_ray import __version__
from spo_ray.errors import UserError
from spo_ray.evaluate.accuracy import by_item
from spo_ray.evaluate.statistics import compare, holm
from spo_ray.report import html
from spo_ray.report.figures import overlaid_figure, spec
from spo_ray.report.finished import Finished, labels, rewrite
from spo_ray.report.scores import CHOSEN_CHANGE, comparisons, grid, linked, results, verdicts
from spo_ray.report.summary import summarise, versions_of
from spo_ray.report.sweep import sensitivity_figures, values_in_words
from spo_ray.report.sweep_figures import importances
from spo_ray.runtime.artifact import write_text
from spo_ray.runtime.console import log, place
from spo_ray.runtime.map_rows import Row
from spo_ray.runtime.run import NOTHING, leaves, shown
from spo_ray.sweep.space import sweep_of, trial_config

MEASURING = ("eval.seeds", "eval.temperature", "eval.max_tokens", "engine.", "data.verifier")
"""Settings that change what is measured of the same checkpoint."""
Runs = Mapping[str, Finished]
"""By their labels."""


class Measured(NamedTuple):
    """A checkpoint's graded answers."""

    title: str
    """The run and the checkpoint."""
    digest: str
    """Of the stage: equal ones are the same answers of the same checkpoint."""
    values: dict[str, dict[str, float]]
    """By metric and question."""


def write_reports(found: Sequence[Finished], out: Path | None) -> None:
    """Write one run's own page anew, or a page that compares several; ``out`` says where that goes.

    Raises:
        UserError: a run is named twice, or ``out`` is given for a run's own page.
    """
    if not found:
        raise UserError("name the folder of a finished run, such as runs/quickstart; with several they are compared")
    if len({each.run.root for each in found}) < len(found):
        raise UserError("a run is named twice")
    if len(found) == 1:
        if out:
            raise UserError("--out is for a comparison: a run's own page is always in its folder, report/index.html")
        rewrite(found[0])
        return
    file = out or found[0].run.root.parent / "report-comparison"
    file = file if file.suffix == ".html" else file / "index.html"
    write_comparison(dict(zip(labels(found), found, strict=True)), file)
    log("report", place(file))


def write_comparison(runs: Runs, file: Path) -> None:
    """Write the page."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sections = [
        f"<h1>Comparison of {len(runs)} runs</h1>",
        *_results(runs, file.parent),
        *_tests(runs),
        *_trajectories(runs),
        *_sensitivity(runs),
        *_differences(runs),
    ]
    write_text(file, html.page(f"spo_ray: {', '.join(runs)}", sections, f"spo_ray {__version__}"))


def _results(runs: Runs, folder: Path) -> Iterator[str]:
    lines, remarks = [], []
    for label, found in runs.items():
        root = found.run.root
        prefix = quote(os.path.relpath(root, folder))
        own = html.link(label, f"{prefix}/report/index.html") if (root / "report" / "index.html").exists() else label
        for line in _lines(found):
            path = found.methods[line["method"]].path if line["method"] in found.methods else None
            lines.append({"run": own} | linked(line, root, prefix, path))
        if found.trials:
            best = found.trials.best
            said = "its best point is shown" if found.methods else "no trial finished, so nothing was measured"
            remarks.append(f"{label} is a sweep of {sweep_of(found.run.config).method}: {said}.")
            remarks[-1] += f" Best: {values_in_words(best.values)}."
    yield "<h2>Results</h2>"
    yield html.table(*grid(lines, ("run", "method")), change=CHOSEN_CHANGE)
    yield from map(html.note, remarks)
    yield html.note(
        "In brackets 95% intervals. p: against the same run's sft, adjusted by Holm's method within the run. Δ log π "
        "is over each run's own training pairs. Every figure leads to its rows."
    )


def _lines(found: Finished) -> list[dict[str, str]]:
    if found.evaluation:
        summary = summarise(found.run, found.methods, found.evaluation)
        return results(summary["methods"], summary["comparisons"])
    return [{"method": "best point"}]


def _tests(runs: Runs) -> Iterator[str]:
    """Paired tests wherever the questions are the same, and why not elsewhere."""
    yield "<h2>Paired tests between runs, method by method</h2>"
    asked = {label: _questions(found) for label, found in runs.items()}
    answers = {label: _by_method(label, found) for label, found in runs.items()}
    compared: list[Row] = []
    for first, second in combinations(runs, 2):
        reason = _obstacle(first, second, asked, answers)
        if reason:
            yield html.note(f"{first} and {second}: no paired test is possible, {reason}.")
        else:
            compared += _compared(answers[first], answers[second])
    for metric in dict.fromkeys(row["metric"] for row in compared):
        rows = [row for row in compared if row["metric"] == metric]
        for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
            row["p_adjusted"] = adjusted
        yield from verdicts(rows, metric)
        yield from comparisons(rows)
    if compared:
        yield html.note(
            "On the same held-out questions, without checkpoints that both runs share; p-values are adjusted over all "
            "rows of a metric by Holm's method. The tests know of the noise of items and sampling, not of that of "
            "training: it takes several training seeds."
        )
        other = [key for key in _differing(runs) if key.startswith(MEASURING)]
        if other:
            yield html.note(f"Measured with different settings, which the tests can't tell apart: {', '.join(other)}.")


def _questions(found: Finished) -> dict[str, str]:
    """What was asked, with the gold answers, by id."""
    return {row["id"]: f"{row['prompt']}\n{row.get('gold')}" for row in found.held_out.rows()}


def _by_method(label: str, found: Finished) -> dict[str, list[Measured]]:
    """Graded answers by the method that the checkpoint was trained by."""
    methods: dict[str, list[Measured]] = {}
    for name, artifact in (found.evaluation.answers if found.evaluation else {}).items():
        measured = Measured(f"{label}/{name}", artifact.digest, by_item(artifact.rows()))
        methods.setdefault(_method(found, name), []).append(measured)
    return methods


def _method(found: Finished, name: str) -> str:
    """The method that a checkpoint was trained by; a sweep's are all of one."""
    return sweep_of(found.run.config).method if found.trials and name in found.methods else name


def _obstacle(first: str, second: str, asked: Mapping[str, Any], answers: Mapping[str, Any]) -> str:
    """Why two runs can't be compared item by item; empty where they can."""
    for label in (first, second):
        if not answers[label]:
            return f"{label} has no graded answers"
    one, other = asked[first], asked[second]
    if one != other:
        shared = one.keys() & other.keys()
        same = sum(one[key] == other[key] for key in shared)
        return (
            f"their held-out questions differ: {len(one)} and {len(other)}, {len(shared)} ids in common, of which "
            f"{same} have the same prompt and answer"
        )
    if not answers[first].keys() & answers[second].keys():
        return "they have no method of the same name"
    return ""


def _compared(first: Mapping[str, list[Measured]], second: Mapping[str, list[Measured]]) -> Iterator[Row]:
    for method in (name for name in first if name in second):
        for one, other in product(first[method], second[method]):
            for metric in one.values if one.digest != other.digest else ():
                yield from compare(metric, {one.title: one.values[metric], other.title: other.values[metric]})


def _trajectories(runs: Runs) -> Iterator[str]:
    paths: dict[str, dict[str, list[Path]]] = {}
    for label, found in runs.items():
        for name, artifact in found.methods.items():
            paths.setdefault(label, {}).setdefault(_method(found, name), []).append(artifact.path)
    yield "<h2>Log-probabilities during training</h2>"
    yield html.figure(overlaid_figure(paths))
    yield html.note("Mean over each run's own probe pairs; dashed: rejected answers. Symmetric logarithmic scale.")


def _sensitivity(runs: Runs) -> Iterator[str]:
    for label, found in runs.items():
        if found.trials:
            sweep, rows = sweep_of(found.run.config), found.trials.rows
            yield f"<h2>Sensitivity: {escape(label)}</h2>"
            yield html.note(f"{len(rows)} trials of {sweep.method}, on validation rows; its own page has them all.")
            for title, chart in sensitivity_figures(rows, sweep, importances(rows, sweep)):
                yield f"<h3>{escape(title)}</h3>"
                yield html.figure(spec(chart))


def _differences(runs: Runs) -> Iterator[str]:
    yield "<h2>Settings that differ</h2>"
    found = _differing(runs)
    if found:
        yield html.table(["key", *runs], [[key, *map(shown, values)] for key, values in found.items()])
    else:
        yield html.note("None.")


def _differing(runs: Runs) -> dict[str, list[Any]]:
    """Values by dotted key where they are not all the same, of sweeps the best point's; versions of packages too."""
    trees: list[dict[str, Any]] = []
    for found in runs.values():
        config = found.run.config
        if found.trials:
            config = trial_config(config, found.trials.best.values, config.seed)
        tree = config.model_dump(mode="json", exclude={"name", "output", "tracking"})
        trees.append(dict(leaves(tree | {"versions": versions_of(found.run)})))
    table = {
        key: [tree.get(key, NOTHING) for tree in trees] for key in dict.fromkeys(k for tree in trees for k in tree)
    }
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}
