"""The comparison page: results of finished runs, paired tests, trajectories, sweeps' sensitivity and settings."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from spo_ray import __version__
from spo_ray.config.keys import leaves
from spo_ray.errors import UserError
from spo_ray.evaluate.accuracy import by_item
from spo_ray.evaluate.statistics import compare, holm
from spo_ray.report import scores
from spo_ray.report.figures import overlaid_figure, spec
from spo_ray.report.finished import Finished, labels, rewrite
from spo_ray.report.page import Link, Table, render
from spo_ray.report.summary import summarise, versions_of
from spo_ray.report.sweep import values_in_words
from spo_ray.report.sweep_figures import importances, sensitivity_figures
from spo_ray.runtime.artifact import write_text
from spo_ray.runtime.console import log, place
from spo_ray.runtime.manifest import NOTHING, shown
from spo_ray.runtime.map_rows import Row
from spo_ray.sweep.space import sweep_of, trial_config

MEASURING = ("eval.seeds", "eval.temperature", "eval.max_tokens", "engine.", "data.verifier")
"""Prefixes of settings that change the results of the same checkpoint."""
Runs = Mapping[str, Finished]
"""Runs by their labels."""


class Measured(NamedTuple):
    """A checkpoint's graded answers."""

    title: str
    """Label of the run and name of the checkpoint."""
    digest: str
    """Digest of the stage; equal digests are the same answers of the same checkpoint."""
    values: dict[str, dict[str, float]]
    """Values by metric and question."""


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
    """Write a page that compares finished runs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "runs": list(runs),
        "versions": {"spo_ray": __version__},
        "results": _results(runs, file.parent),
        "sweeps": _sweeps(runs),
        **_tests(runs),
        "trajectories": overlaid_figure(_trainings(runs)),
        "differing": Table(["key", *runs], [[key, *map(shown, values)] for key, values in _differing(runs).items()]),
    }
    write_text(file, render("comparison.html.j2", **content))


def _results(runs: Runs, folder: Path) -> Table:
    """Return a line for each run and checkpoint; ``folder`` is the page's, where its links start."""
    lines = []
    for label, found in runs.items():
        root = found.run.root
        prefix = quote(os.path.relpath(root, folder))
        own = Link(label, f"{prefix}/report/index.html") if (root / "report" / "index.html").exists() else label
        for line in _lines(found):
            path = found.methods[line["method"]].path if line["method"] in found.methods else None
            lines.append({"run": own} | scores.linked(line, root, prefix, path))
    return scores.results_table(lines, ("run", "method"))


def _sweeps(runs: Runs) -> list[dict[str, Any]]:
    """Return the best point and the sensitivity figures of each sweep."""
    sweeps = []
    for label, found in runs.items():
        if found.trials:
            sweep, rows = sweep_of(found.run.config), found.trials.rows
            best = values_in_words(found.trials.best.values)
            own = {"label": label, "method": sweep.method, "measured": bool(found.methods), "best": best}
            figures = sensitivity_figures(rows, sweep, importances(rows, sweep))
            sweeps.append(own | {"trials": len(rows), "figures": [(title, spec(chart)) for title, chart in figures]})
    return sweeps


def _lines(found: Finished) -> list[dict[str, str]]:
    if found.evaluation:
        summary = summarise(found.run, found.methods, found.evaluation)
        return scores.results(summary["methods"], summary["comparisons"], found.run.config.reference)
    return [{"method": "best point"}]


def _tests(runs: Runs) -> dict[str, Any]:
    """Return the paired tests by metric, and for each two runs that can't be tested the reason."""
    asked = {label: _questions(found) for label, found in runs.items()}
    answers = {label: _by_method(label, found) for label, found in runs.items()}
    untested = []
    compared: list[Row] = []
    for first, second in combinations(runs, 2):
        reason = _obstacle(first, second, asked, answers)
        if reason:
            untested.append((first, second, reason))
        else:
            compared += _compared(answers[first], answers[second])
    tests = []
    for metric in dict.fromkeys(row["metric"] for row in compared):
        rows = [row for row in compared if row["metric"] == metric]
        for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
            row["p_adjusted"] = adjusted
        tests.append((scores.verdict(rows, metric), scores.comparison_tables(rows)))
    other = [key for key in _differing(runs) if key.startswith(MEASURING)]
    return {"untested": untested, "tests": tests, "measured_differently": other}


def _questions(found: Finished) -> dict[str, str]:
    """Return prompts with their gold answers by question id."""
    return {row["id"]: f"{row['prompt']}\n{row.get('gold')}" for row in found.held_out.rows()}


def _by_method(label: str, found: Finished) -> dict[str, list[Measured]]:
    """Return graded answers by the method that trained the checkpoint."""
    methods: dict[str, list[Measured]] = {}
    for name, artifact in (found.evaluation.answers if found.evaluation else {}).items():
        measured = Measured(f"{label}/{name}", artifact.digest, by_item(artifact.rows()))
        methods.setdefault(_method(found, name), []).append(measured)
    return methods


def _method(found: Finished, name: str) -> str:
    """Return the method that trained a checkpoint; all checkpoints of a sweep have the same method."""
    return sweep_of(found.run.config).method if found.trials and name in found.methods else name


def _obstacle(first: str, second: str, asked: Mapping[str, Any], answers: Mapping[str, Any]) -> str:
    """Return the reason why two runs can't be compared item by item; empty if they can."""
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


def _trainings(runs: Runs) -> list[tuple[str, str, Path]]:
    """Return label of the run, method and folder of each training."""
    found = [(label, each, name) for label, each in runs.items() for name in each.methods]
    return [(label, _method(each, name), each.methods[name].path) for label, each, name in found]


def _differing(runs: Runs) -> dict[str, list[Any]]:
    """Return the values of settings and package versions that are not equal in all runs, by dotted key.

    A sweep has the settings of its best point.
    """
    trees: list[dict[str, Any]] = []
    for found in runs.values():
        config = found.run.config
        if found.trials:
            config = trial_config(config, found.trials.best.values, config.seed)
        tree = config.model_dump(mode="json", exclude={"name", "output", "tracking"})
        trees.append(dict(leaves(tree | {"versions": versions_of(found.run)})))
    keys = dict.fromkeys(key for tree in trees for key in tree)
    table = {key: [tree.get(key, NOTHING) for tree in trees] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}
