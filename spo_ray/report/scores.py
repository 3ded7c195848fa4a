"""Tables of measured numbers; each number links to the rows it was computed from."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from spo_ray.config.evaluate import LM_EVAL
from spo_ray.evaluate.lm_eval import RESULTS
from spo_ray.evaluate.statistics import LEVEL, in_words
from spo_ray.report.headline import p_text, p_values
from spo_ray.report.page import Cell, Link, Shade, Table
from spo_ray.runtime.artifact import Artifact
from spo_ray.train.spec import RESULT

SHIFTED = re.compile(r"logp_.+_of_samples|kl_checkpoint_to_.+")
"""Pattern of the text health metrics that the stage ``shift`` computes."""
HEALTH = {
    "sampled/length": ("tokens per answer", ".1f"),
    "sampled/unfinished": ("answers cut off", ".1%"),
    "sampled/repetition_4": ("repeated 4-grams", ".1%"),
    "sampled/longest_run": ("longest repeated run, words", ".1f"),
    "entropy": ("entropy per answer, nats", ".2f"),
    "entropy_per_token": ("entropy per token, nats", ".2f"),
    "kl_{}_to_checkpoint": ("KL({} ‖ checkpoint), nats", ".2f"),
    "kl_checkpoint_to_{}": ("KL(checkpoint ‖ {}), nats", ".2f"),
}
"""Metrics of text health that are shown coloured, with their names and formats; {} is the reference."""
DEGENERATE = tuple(HEALTH)[:4]
"""Metrics of text health that are larger in degenerate text."""
PART = "part-0.parquet"
Methods = Mapping[str, Any]
"""Results by checkpoint; ``methods`` of ``summary.json``."""
Tests = Sequence[Mapping[str, Any]]
"""Paired tests; ``comparisons`` of ``summary.json``."""


class Rows(NamedTuple):
    """Where the rows of a run's numbers are."""

    root: Path
    """The run's folder."""
    prefix: str = ".."
    """Its URL, relative to the page."""
    trained: Mapping[str, Artifact] = {}
    """Trained checkpoints by method."""

    def link(self, text: str, target: str) -> Cell:
        """Return a text that links to a file of the run, if there is such a file."""
        there = text and (self.root / target).is_file()
        return Link(text, f"{self.prefix}/{quote(target, safe='/@')}") if there else text

    def of(self, text: str, stage: str, name: str) -> Cell:
        """Return a text that links to a checkpoint's rows in a kind of stage: eval, comparisons or method."""
        if stage == "method":
            own = self.trained.get(name)
            return self.link(text, f"{own.path.relative_to(self.root)}/{RESULT}") if own else text
        return self.link(text, f"{stage if stage == 'comparisons' else f'{stage}_{name}'}/{PART}")


def with_interval(entry: Mapping[str, Any] | None, form: str = ".1%") -> str:
    """Return a value in the format ``form`` with its interval, if it has one; empty for None."""
    if entry is None:
        return ""
    low, high = (f"{entry.get(side, 0.0):{form}}".removesuffix("%") for side in ("low", "high"))
    return f"{entry['value']:{form}}" + (f" ({low} – {high})" if "low" in entry else "")


def _sampled(entry: Mapping[str, Any]) -> str:
    spread = "" if entry["std"] is None else f" ±\N{NO-BREAK SPACE}{entry['std']:.1%}"
    value, *interval = with_interval(entry).partition(" (")
    return "".join([value, spread, *interval])


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "greedy, 95%": ("eval", with_interval),
    "p against ": ("comparisons", p_text),  # the name of the reference follows
    "held-out Δ log π chosen": ("method", "{:+.2f}".format),
    "held-out Δ log π rejected": ("method", "{:+.2f}".format),
    "held-out reward accuracy, 95%": ("method", with_interval),
    "Δ log π chosen": ("method", "{:+.2f}".format),
    "Δ log π rejected": ("method", "{:+.2f}".format),
    "sampled, 95%": ("eval", _sampled),
}
"""Columns of the results: kind of stage with their rows, and how a value is written."""


def results(methods: Methods, compared: Tests, reference: str, rows: Rows | None = None) -> list[dict[str, Cell]]:
    """Return one line for each checkpoint with results; a line has no entry for a column without a value.

    ``reference`` is the name of the checkpoint that the others are compared with. With ``rows``, cells link to them.
    """
    lines, tested, link = [], p_values(compared), rows.of if rows else (lambda text, *_: text)
    for name, entry in methods.items():
        held_out = entry.get("held_out", {})
        values = [entry["accuracy_greedy"], tested.get(frozenset((name, reference)))]
        values += [held_out.get(key) for key in ("delta_logp_chosen", "delta_logp_rejected", "reward_accuracy")]
        values += [entry[key] for key in ("delta_logp_chosen", "delta_logp_rejected", "accuracy_sampled")]
        line: dict[str, Cell] = {"method": link(name, "eval", name)}
        for (column, (stage, written)), value in zip(COLUMNS.items(), values, strict=True):
            if value is not None:
                line[f"{column}{reference}" if column.endswith(" ") else column] = link(written(value), stage, name)
        lines += [line] if len(line) > 1 else []
    return lines


def results_table(lines: Sequence[Mapping[str, Cell]], first: Sequence[str] = ("method",)) -> Table:
    """Return a table with the columns ``first`` and those of ``COLUMNS`` that at least one line has, in their order."""
    shown = dict.fromkeys(name for column in COLUMNS for line in lines for name in line if name.startswith(column))
    return Table([*first, *shown], [[line.get(name, "") for name in (*first, *shown)] for line in lines])


def text_table(methods: Methods, compared: Tests, reference: str) -> list[str]:
    """Return the lines of the results table for a terminal."""
    table = results_table(results(methods, compared, reference))
    rows = [list(map(str, row)) for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def comparison_tables(compared: Tests) -> list[tuple[str, Table]]:
    """Return a title and a table of the paired tests for each metric."""
    header = ["compared", "difference", "95% interval", "wins : losses", "p", "p, Holm", "in words"]
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in compared:
        found.setdefault(row["metric"], []).append(row)
    titles = {metric: f"Paired tests of {metric} ({len(rows)}, {rows[-1]['test']})" for metric, rows in found.items()}
    return [(titles[metric], Table(header, list(map(_tested, rows)))) for metric, rows in found.items()]


def _tested(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['first']} − {row['second']}",
        f"{row['difference']:+.3g}",
        "" if row["low"] is None else f"{row['low']:+.3g} – {row['high']:+.3g}",
        f"{row['wins']} : {row['losses']}",
        f"{row['p_value']:.2g}",
        f"{row['p_adjusted']:.2g}",
        in_words(row),
    ]


def matrix(compared: Tests) -> Table:
    """Return the paired tests of the greedy accuracies, row minus column, with a row and a column for a checkpoint."""
    found = {(row["second"], row["first"]): row for row in compared if row["metric"] == "accuracy_greedy"}
    columns, names = (list(dict.fromkeys(pair[side] for pair in found)) for side in (1, 0))
    return Table(["", *columns], [[n, *(_tested_cell(found.get((n, other))) for other in columns)] for n in names])


def _tested_cell(row: Mapping[str, Any] | None) -> Shade:
    if row is None:
        return Shade("")
    difference, p_value = -row["difference"], row["p_adjusted"]
    level = 0 if p_value >= LEVEL else 1 if p_value >= LEVEL / 50 else 2
    points = round(100 * difference, 1) + 0.0  # never -0.0
    return Shade(f"{points:+.1f} (p {p_text(p_value)})", level if difference > 0 else -level)


def health_strip(methods: Methods, reference: str) -> Table:
    """Return text health of samples, coloured by the departure from the reference in widths of both 95% intervals."""
    lines: list[list[Cell]] = []
    for key, (title, form) in HEALTH.items():
        found = {name: entry["scores"].get(f"health/{key.format(reference)}") for name, entry in methods.items()}
        usual = {"value": 0.0} if key.startswith("kl_") else found[reference]
        if usual and any(found.values()):
            lines.append([title.format(reference), *(_departure(value, usual, form) for value in found.values())])
    return Table(["", *methods], lines)


def _departure(entry: Mapping[str, Any] | None, usual: Mapping[str, Any], form: str) -> Shade:
    if entry is None:
        return Shade("")
    level = _level(entry, usual)
    arrow = "" if not level else " ▲" if level > 0 else " ▼"
    return Shade(f"{entry['value']:{form}}{arrow}", level)


def _level(entry: Mapping[str, Any], usual: Mapping[str, Any]) -> int:
    """Return how far a value is from another, in widths of both intervals: from -2 to 2."""
    widths = [(each.get("high", each["value"]) - each.get("low", each["value"])) / 2 for each in (entry, usual)]
    difference, room = entry["value"] - usual["value"], math.hypot(*widths)
    level = (abs(difference) > room) + (abs(difference) > 2 * room)
    return level if difference > 0 else -level


def health_verdict(methods: Methods, reference: str) -> list[str]:
    """Return two sentences: whose samples show signs of degenerate text, and whose are furthest from the start."""
    scores = {name: entry["scores"] for name, entry in methods.items() if "health/entropy" in entry["scores"]}
    usual, told, distance = scores.get(reference), [], f"kl_checkpoint_to_{reference}"
    trained = {name: found for name, found in scores.items() if name not in ("base", reference)}
    if not usual or not trained:
        return []
    for name, found in trained.items():
        pairs = {HEALTH[key]: (found[f"health/{key}"], usual[f"health/{key}"]) for key in DEGENERATE}
        grown = {title: pair for title, pair in pairs.items() if _level(*pair) > 0}
        values = [f"{t}: {a['value']:{f}} against {b['value']:{f}}" for (t, f), (a, b) in grown.items()]
        told += [f"{name} ({', '.join(values)})"] if values else []
    signs = f"longer, more repetitive or more often cut off than {reference}'s"
    sentences = [
        f"Samples {signs}, beyond noise: {'; '.join(told)}."
        if told
        else f"No method's samples are {signs}, beyond noise."
    ]
    far = {
        name: found[f"health/{distance}"]["value"] for name, found in trained.items() if f"health/{distance}" in found
    }
    if far:
        last = max(far, key=far.__getitem__)
        sentences.append(f"Furthest from {reference} is {last}: KL {far[last]:.2f} nats per answer.")
    return sentences


def other_suites(methods: Methods, rows: Rows) -> dict[str, Table]:
    """Return the metrics of each suite except accuracy, with a column for each checkpoint."""
    suites: dict[str, list[list[Cell]]] = {}
    for key in dict.fromkeys(key for entry in methods.values() for key in entry["scores"]):
        suite, _, metric = key.partition("/")
        values = {name: with_interval(entry["scores"].get(key), ".3g") for name, entry in methods.items()}
        cells = [rows.link(value, _rows(suite, metric, name)) for name, value in values.items()]
        if suite != "accuracy":
            suites.setdefault(suite, []).append([metric, *cells])
    return {suite: Table(["", *methods], lines) for suite, lines in suites.items()}


def _rows(suite: str, metric: str, name: str) -> str:
    """Return the path of a metric's rows in the run's folder."""
    if suite == "alpaca_eval":
        return f"judged_{name}@{metric.partition('/')[0]}/{PART}"
    if suite.startswith(LM_EVAL):
        return f"lm_eval_{suite.removeprefix(LM_EVAL)}@{name}/{RESULTS}"
    return f"{'shift' if SHIFTED.fullmatch(metric) else 'health'}_{name}/{PART}"
