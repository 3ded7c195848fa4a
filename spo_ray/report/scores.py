"""Tables of measured numbers; each number links to the rows it was computed from."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from spo_ray.config.evaluate import LM_EVAL
from spo_ray.evaluate.lm_eval import RESULTS
from spo_ray.evaluate.statistics import LEVEL, in_words
from spo_ray.report.headline import Sentence, p_text
from spo_ray.report.page import Cell, Link, Shade, Table
from spo_ray.train.spec import RESULT

AGAINST = "p against "
"""Beginning of the name of the column with p-values."""
COLUMNS = {
    "greedy, 95%": "eval",
    AGAINST: "comparisons",  # the name of the reference follows
    "held-out Δ log π chosen": "method",
    "held-out Δ log π rejected": "method",
    "held-out reward accuracy, 95%": "method",
    "Δ log π chosen": "method",
    "Δ log π rejected": "method",
    "sampled ± sd, 95%": "eval",
}
"""Kind of stage with the rows of each column of the results."""
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
NOTHING_MOVED = {"value": 0.0}
PART = "part-0.parquet"
Methods = Mapping[str, Any]
"""Results by checkpoint; ``methods`` of ``summary.json``."""
Rows = Sequence[Mapping[str, Any]]


def results(methods: Methods, compared: Rows, reference: str) -> list[dict[str, str]]:
    """Return one line for each checkpoint with results; a line has no entry for a column without a value.

    ``reference`` is the name of the checkpoint that the others are compared with.
    """
    p_values = {}
    for row in compared:
        pair = {row["first"], row["second"]}
        if row["metric"] == "accuracy_greedy" and reference in pair:
            p_values[(pair - {reference}).pop()] = p_text(row["p_adjusted"])
    lines = [{"method": name} | _cells(entry, p_values.get(name), reference) for name, entry in methods.items()]
    return [line for line in lines if len(line) > 1]


def _cells(entry: Mapping[str, Any], p_value: str | None, reference: str) -> dict[str, str]:
    greedy, sampled, held_out = entry["accuracy_greedy"], entry["accuracy_sampled"], entry.get("held_out", {})
    reward = held_out.get("reward_accuracy")
    spread = f" ± {sampled['std']:.1%}" if sampled and sampled["std"] is not None else ""
    cells = (
        greedy and f"{greedy['value']:.1%}{_percent_interval(greedy)}",
        p_value,
        *_changes(held_out),
        reward and f"{reward['value']:.1%}{_percent_interval(reward)}",
        *_changes(entry),
        sampled and f"{sampled['value']:.1%}{spread}{_percent_interval(sampled)}",
    )
    names = (f"{AGAINST}{reference}" if column == AGAINST else column for column in COLUMNS)
    return {name: cell for name, cell in zip(names, cells, strict=True) if cell}


def _changes(entry: Mapping[str, Any]) -> list[str | None]:
    changes = (entry.get(f"delta_logp_{side}") for side in ("chosen", "rejected"))
    return [None if change is None else f"{change:+.2f}" for change in changes]


def _percent_interval(entry: Mapping[str, float]) -> str:
    return "" if "low" not in entry else f" ({100 * entry['low']:.1f} – {100 * entry['high']:.1f})"


def with_interval(entry: Mapping[str, Any] | None, form: str) -> str:
    """Return a value in the format ``form`` with its interval, if it has one; empty for None."""
    if entry is None:
        return ""
    interval = f" ({entry['low']:{form}} – {entry['high']:{form}})" if "low" in entry else ""
    return f"{entry['value']:{form}}{interval}"


def results_table(lines: Sequence[Mapping[str, Cell]], first: Sequence[str] = ("method",)) -> Table:
    """Return a table with the columns ``first`` and those of ``COLUMNS`` that at least one line has."""
    order, shown = list(COLUMNS), dict.fromkeys(name for line in lines for name in line if _column(name) in COLUMNS)
    header = [*first, *sorted(shown, key=lambda name: order.index(_column(name)))]
    return Table(header, [[line.get(name, "") for name in header] for line in lines])


def _column(name: str) -> str:
    """Return the key in ``COLUMNS`` of a column."""
    return AGAINST if name.startswith(AGAINST) else name


def linked(line: Mapping[str, str], root: Path, prefix: str, trained: Path | None) -> dict[str, Cell]:
    """Return a line of results whose cells link to their rows in the run at ``root``.

    ``prefix`` is the URL of ``root`` relative to the page; ``trained`` the folder of the method's training, if any.
    """
    stages, paths = {"method": "eval"} | COLUMNS, {line["method"]: trained} if trained else {}
    places = {column: _place(root, stages[_column(column)], line["method"], paths) for column in line}
    return {column: _link(value, root, prefix, places[column]) for column, value in line.items()}


def linked_sentences(found: Sequence[Sentence], root: Path, paths: Mapping[str, Path]) -> list[list[Cell]]:
    """Return sentences whose facts link to their rows in the run at ``root``."""
    return [
        [p if isinstance(p, str) else _link(p.text, root, "..", _place(root, p.stage, p.name, paths)) for p in each]
        for each in found
    ]


def _place(root: Path, stage: str, name: str, paths: Mapping[str, Path]) -> str:
    """Return the path of a checkpoint's rows in a kind of stage; empty for a checkpoint that has no such stage."""
    if stage == "method":
        return f"{paths[name].relative_to(root)}/{RESULT}" if name in paths else ""
    return f"comparisons/{PART}" if stage == "comparisons" else f"eval_{name}/{PART}"


def _link(value: str, root: Path, prefix: str, target: str) -> Cell:
    exists = value and target and (root / target).exists()
    return Link(value, f"{prefix}/{quote(target, safe='/@')}") if exists else value


def text_table(methods: Methods, compared: Rows, reference: str) -> list[str]:
    """Return the lines of the results table for a terminal."""
    table = results_table(results(methods, compared, reference))
    rows = [list(map(str, row)) for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def comparison_tables(compared: Rows) -> list[tuple[str, Table]]:
    """Return a title and a table of the paired tests for each metric."""
    header = ["compared", "difference", "95% interval", "wins : losses", "p", "p, Holm", "in words"]
    tables = []
    for metric in dict.fromkeys(row["metric"] for row in compared):
        rows = [row for row in compared if row["metric"] == metric]
        tables.append(
            (f"{metric}: {len(rows)} comparisons, {rows[-1]['test']}", Table(header, list(map(_tested, rows))))
        )
    return tables


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


def matrix(compared: Rows) -> Table:
    """Return the paired tests of the greedy accuracies, row minus column, with a row and a column for a checkpoint."""
    rows = [row for row in compared if row["metric"] == "accuracy_greedy"]
    names = list(dict.fromkeys(row[side] for side in ("first", "second") for row in rows))
    found = {(row["second"], row["first"]): row for row in rows}
    lines: list[list[Cell]] = [
        [name, *(_tested_cell(found[name, other]) if (name, other) in found else Shade("") for other in names[:-1])]
        for name in names[1:]
    ]
    return Table(["", *names[:-1]], lines)


def _tested_cell(row: Mapping[str, Any]) -> Shade:
    difference, p_value = -row["difference"], row["p_adjusted"]
    level = 0 if p_value >= LEVEL else 1 if p_value >= LEVEL / 50 else 2
    return Shade(f"{100 * difference:+.1f} (p {p_text(p_value)})", level if difference > 0 else -level)


def health_strip(methods: Methods, reference: str) -> Table:
    """Return text health of samples, coloured by the departure from the reference in widths of both 95% intervals."""
    lines: list[list[Cell]] = []
    for key, (title, form) in HEALTH.items():
        found = [entry["scores"].get(f"health/{key.format(reference)}") for entry in methods.values()]
        usual = NOTHING_MOVED if key.startswith("kl_") else found[list(methods).index(reference)]
        if usual and any(found):
            lines.append([title.format(reference), *(_departure(value, usual, form) for value in found)])
    return Table(["", *methods], lines)


def _departure(entry: Mapping[str, Any] | None, usual: Mapping[str, Any], form: str) -> Shade:
    if entry is None:
        return Shade("")
    widths = [(each.get("high", each["value"]) - each.get("low", each["value"])) / 2 for each in (entry, usual)]
    difference, room = entry["value"] - usual["value"], math.hypot(*widths)
    level = (abs(difference) > room) + (abs(difference) > 2 * room)
    arrow = ("", " ▲", " ▼")[(difference > 0) - (difference < 0)] if level else ""
    return Shade(f"{entry['value']:{form}}{arrow}", level if difference > 0 else -level)


def verdict(compared: Rows, metric: str = "accuracy_greedy") -> str:
    """Return the conclusions of a metric's paired tests in words; empty without tests."""
    found = [row for row in compared if row["metric"] == metric]
    if not found:
        return ""
    sure = [in_words(row) for row in found if row["p_adjusted"] < LEVEL]
    told = "; ".join(sure) + "." if sure else ""
    return f"{metric}: {told} {len(found) - len(sure)} of {len(found)} differences are not distinguishable from noise."


def other_suites(methods: Methods, root: Path) -> dict[str, Table]:
    """Return the metrics of each suite except accuracy, with a column for each checkpoint."""
    keys = dict.fromkeys(key for entry in methods.values() for key in entry["scores"])
    suites: dict[str, list[list[Cell]]] = {}
    for suite, _, metric in (key.partition("/") for key in keys if not key.startswith("accuracy/")):
        values = {name: entry["scores"].get(f"{suite}/{metric}") for name, entry in methods.items()}
        cells = [
            _link(with_interval(value, ".3g"), root, "..", _rows(suite, metric, name)) for name, value in values.items()
        ]
        suites.setdefault(suite, []).append([metric, *cells])
    return {suite: Table(["", *methods], lines) for suite, lines in suites.items()}


def _rows(suite: str, metric: str, name: str) -> str:
    """Return the path of a metric's rows in the run's folder."""
    if suite == "alpaca_eval":
        return f"judged_{name}@{metric.partition('/')[0]}/{PART}"
    if suite.startswith(LM_EVAL):
        return f"lm_eval_{suite.removeprefix(LM_EVAL)}@{name}/{RESULTS}"
    return f"{'shift' if SHIFTED.fullmatch(metric) else 'health'}_{name}/{PART}"
