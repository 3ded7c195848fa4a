"""The comparison page: results of finished runs, paired tests, trajectories, sweeps' sensitivity and settings."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from spo_ray import __version__
from spo_ray.config.keys import leaves
from spo_ray.errors import UserError
from spo_ray.evaluate.accuracy import by_item
from spo_ray.evaluate.statistics import LEVEL, compare, holm, in_words
from spo_ray.report import scores
from spo_ray.report.figures import overlaid_figure, spec
from spo_ray.report.page import Cell, Table, render
from spo_ray.report.run_page import write_report
from spo_ray.report.summary import Finished, summarise, versions_of
from spo_ray.report.sweep import values_in_words, write_sweep_report
from spo_ray.report.sweep_figures import importances, sensitivity_figures
from spo_ray.runtime.artifact import write_answer
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
    method: str
    """Method that trained it."""
    digest: str
    """Digest of the stage; equal digests are the same answers of the same checkpoint."""
    values: dict[str, dict[str, float]]
    """Values by metric and question."""


def named(found: Sequence[Finished]) -> dict[str, Finished]:
    """Return runs by labels: their folders' names, with as much of the way there as tells them apart.

    Raises:
        UserError: there are none, or one is named twice.
    """
    if not found:
        raise UserError("name the folder of a finished run, such as runs/quickstart; with several they are compared")
    parts, depth = [each.run.root.parts for each in found], 1
    if len(set(parts)) < len(parts):
        raise UserError("a run is named twice")
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return {"/".join(part[-depth:]): each for part, each in zip(parts, found, strict=True)}


def write_reports(runs: Runs, out: Path | None, samples: int | None = None) -> Path:
    """Write one run's own page anew, with ``samples`` prompts, or a page that compares several at ``out``; return it.

    Raises:
        UserError: ``out`` is given for a run's own page, or another process is at work in its folder.
    """
    first = next(iter(runs.values()))
    if len(runs) == 1:
        if out:
            raise UserError("--out is for a comparison: a run's own page is always in its folder, report/index.html")
        rewrite(first, samples)
        return first.run.root / "report" / "index.html"
    file = out or first.run.root.parent / "report-comparison"
    file = file if file.suffix == ".html" else file / "index.html"
    write_answer(file, render("comparison.html.j2", **_content(runs, file.parent)))
    log("report", place(file))
    return file


def rewrite(found: Finished, samples: int | None = None) -> None:
    """Write a run's own page anew, also where it is there; ``samples`` is the number of prompts with answers.

    Raises:
        UserError: another process is at work in the folder.
    """
    with found.run.locked():
        shutil.rmtree(found.run.root / "report", ignore_errors=True)  # else the stage is reused
        if found.trials:
            write_sweep_report(found.run, found.trials.artifact, found.trials.best, found.evaluation)
        else:
            write_report(found, samples)


def _content(runs: Runs, folder: Path) -> dict[str, Any]:
    """Return the data of ``comparison.html.j2``; ``folder`` is the page's, where its links start."""
    differing = _differing(runs)
    trainings = [(k, _method(f, name), own.path) for k, f in runs.items() for name, own in f.methods.items()]
    return {
        "runs": list(runs),
        "versions": {"spo_ray": __version__},
        "results": _results(runs, folder),
        "sweeps": [_sweep(label, found) for label, found in runs.items() if found.trials],
        **_tests(runs),
        "measured_differently": [key for key in differing if key.startswith(MEASURING)],
        "trajectories": overlaid_figure(trainings),
        "differing": Table(["key", *runs], [[key, *map(shown, values)] for key, values in differing.items()]),
    }


def _results(runs: Runs, folder: Path) -> Table:
    """Return a line for each run and checkpoint."""
    lines: list[dict[str, Cell]] = []
    for label, found in runs.items():
        rows = scores.Rows(found.run.root, quote(os.path.relpath(found.run.root, folder)), found.methods)
        own = rows.link(label, "report/index.html")
        lines += [{"run": own} | line for line in lines_of(found, rows)]
    return scores.results_table(lines, ("run", "method"))


def _sweep(label: str, found: Finished) -> dict[str, Any]:
    """Return the best point and the sensitivity figures of a sweep."""
    assert found.trials
    sweep, rows = sweep_of(found.run.config), found.trials.rows
    figures = sensitivity_figures(rows, sweep, importances(rows, sweep))
    return {
        "label": label,
        "method": sweep.method,
        "measured": bool(found.methods),
        "best": values_in_words(found.trials.best.values),
        "trials": len(rows),
        "figures": [(title, spec(chart)) for title, chart in figures],
    }


def lines_of(found: Finished, rows: scores.Rows | None = None) -> list[dict[str, Cell]]:
    """Return the results of a run, one line for each checkpoint; with ``rows``, cells link to them."""
    summary = summarise(found)
    lines = scores.results(summary["methods"], summary["comparisons"], found.run.config.reference, rows)
    return lines or [{"method": "best point"}]


def _tests(runs: Runs) -> dict[str, Any]:
    """Return the paired tests by metric, and for each two runs that can't be tested the reason."""
    asked = {label: _questions(found) for label, found in runs.items()}
    answers = {label: _measured(label, found) for label, found in runs.items()}
    untested: list[tuple[str, str, str]] = []
    compared: dict[str, list[Row]] = {}
    for first, second in combinations(runs, 2):
        if reason := _obstacle(first, second, asked, answers):
            untested.append((first, second, reason))
            continue
        for row in _compared(answers[first], answers[second]):
            compared.setdefault(row["metric"], []).append(row)
    for rows in compared.values():
        for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
            row["p_adjusted"] = adjusted
    tests = [(_verdict(metric, rows), scores.comparison_tables(rows)) for metric, rows in compared.items()]
    return {"untested": untested, "tests": tests}


def _verdict(metric: str, rows: Sequence[Row]) -> str:
    """Return the conclusions of a metric's paired tests in words."""
    sure = [in_words(row) for row in rows if row["p_adjusted"] < LEVEL]
    told = "; ".join(sure) + "." if sure else ""
    return f"{metric}: {told} {len(rows) - len(sure)} of {len(rows)} differences are not distinguishable from noise."


def _questions(found: Finished) -> dict[str, str]:
    """Return prompts with their gold answers by question id."""
    return {row["id"]: f"{row['prompt']}\n{row.get('gold')}" for row in found.held_out.rows()}


def _measured(label: str, found: Finished) -> list[Measured]:
    """Return the graded answers of a run's checkpoints."""
    return [
        Measured(f"{label}/{name}", _method(found, name), artifact.digest, by_item(artifact.rows()))
        for name, artifact in found.evaluation.answers.items()
    ]


def _method(found: Finished, name: str) -> str:
    """Return the method that trained a checkpoint; all checkpoints of a sweep have the same method."""
    return sweep_of(found.run.config).method if found.trials and name in found.methods else name


def _obstacle(first: str, second: str, asked: Mapping[str, Any], answers: Mapping[str, list[Measured]]) -> str:
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
    methods = [{measured.method for measured in answers[label]} for label in (first, second)]
    return "" if set.intersection(*methods) else "they have no method of the same name"


def _compared(first: list[Measured], second: list[Measured]) -> Iterator[Row]:
    for one, other in product(first, second):
        if one.method == other.method and one.digest != other.digest:
            for metric in one.values:
                yield from compare(metric, {one.title: one.values[metric], other.title: other.values[metric]})


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
