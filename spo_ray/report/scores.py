"""The report's tables of figures, each with a link to the rows that it was made from."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from spo_ray.config.evaluate import LM_EVAL
from spo_ray.evaluate.lm_eval import RESULTS
from spo_ray.evaluate.statistics import LEVEL, in_words
from spo_ray.report import html
from spo_ray.train.spec import RESULT

CHOSEN_CHANGE = "Δ log π chosen"
REFERENCE = "sft"
"""What methods are compared with in the table of results."""
COLUMNS = {
    "greedy, 95%": ("eval", "greedy: in brackets Wilson's 95% interval."),
    "sampled ± sd, 95%": (
        "eval",
        "sampled: the interval is over the questions, ± the standard deviation over seeds.",
    ),
    "p against sft": (
        "comparisons",
        "p: paired test of the greedy answers against sft's, adjusted by Holm's method.",
    ),
    CHOSEN_CHANGE: (
        "method",
        "Δ log π: mean change on the training pairs, in nats, from the SFT checkpoint to the end of the method's "
        "training; red: chosen answers lose probability.",
    ),
    "Δ log π rejected": ("method", ""),
    "held-out reward accuracy, 95%": (
        "method",
        "held-out reward accuracy: share of held-out pairs whose chosen answer has the higher implicit reward.",
    ),
}
"""Of the results: the kind of stage that has a column's rows, and what the column means."""
TITLES = {"health": "Text health", "alpaca_eval": "AlpacaEval"}
NOTES = {
    "health": (
        "Of greedy answers and of samples at temperature 1. length: tokens; unfinished: share cut off by "
        "eval.max_tokens; repetition_4: share of an answer's sequences of 4 words that it had before; longest_run: "
        "words in the longest stretch that repeats itself; distinct_1, distinct_2: different words, or pairs of words, "
        "over all; entropy and kl in nats per answer. logp_of_sft_samples: the SFT model's samples under this "
        "checkpoint; logp_sft_of_samples: this checkpoint's under the SFT model."
    ),
    "alpaca_eval": "average_length: characters; rates: wins against the baseline's answers in percent.",
}
"""What a suite's figures mean."""
SHIFTED = ("logp_sft_of_samples", "kl_checkpoint_to_sft")
PART = "part-0.parquet"
Table = Mapping[str, Any]
"""Figures by checkpoint; ``methods`` of ``summary.json``."""


def results(table: Table, compared: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One line a checkpoint that has any figures: its cells by column, but those that it does not have."""
    p_values = {}
    for row in compared:
        pair = {row["first"], row["second"]}
        if row["metric"] == "accuracy_greedy" and REFERENCE in pair:
            p_values[(pair - {REFERENCE}).pop()] = f"{row['p_adjusted']:.2g}"
    lines = [{"method": name} | _cells(entry, p_values.get(name)) for name, entry in table.items()]
    return [line for line in lines if len(line) > 1]


def _cells(entry: Mapping[str, Any], p_value: str | None) -> dict[str, str]:
    greedy, sampled, changes = entry["accuracy_greedy"], entry["accuracy_sampled"], []
    for key in ("delta_logp_chosen", "delta_logp_rejected"):
        changes.append(None if entry[key] is None else f"{entry[key]:+.2f}")
    reward = entry.get("held_out", {}).get("reward_accuracy")
    spread = "" if sampled is None or sampled["std"] is None else f" ± {sampled['std']:.1%}"
    cells = (
        greedy and f"{greedy['value']:.1%}{_interval(greedy)}",
        sampled and f"{sampled['value']:.1%}{spread}{_interval(sampled)}",
        p_value,
        *changes,
        reward and f"{reward['value']:.1%}{_interval(reward)}",
    )
    return {name: cell for name, cell in zip(COLUMNS, cells, strict=True) if cell}


def _interval(entry: Mapping[str, float]) -> str:
    return "" if "low" not in entry else f" ({100 * entry['low']:.1f} – {100 * entry['high']:.1f})"


def grid(lines: Sequence[Mapping[str, str]], first: Sequence[str] = ("method",)) -> tuple[list[str], list[list[str]]]:
    """A header and rows, of the columns that at least one line has."""
    header = [*first, *(name for name in COLUMNS if any(name in line for line in lines))]
    return header, [[line.get(name, "") for name in header] for line in lines]


def linked(line: Mapping[str, str], root: Path, prefix: str, trained: Path | None) -> dict[str, str]:
    """A line whose cells lead to their rows in the run at ``root``, which a page reaches as ``prefix``."""
    name = line["method"]
    targets = {"eval": f"eval_{name}/{PART}", "comparisons": f"comparisons/{PART}", "method": ""}
    if trained:
        targets["method"] = f"{trained.relative_to(root)}/{RESULT}"
    places = {"method": targets["eval"]} | {column: targets[kind] for column, (kind, _) in COLUMNS.items()}
    return {column: _link(value, root, prefix, places.get(column, "")) for column, value in line.items()}


def _link(value: str, root: Path, prefix: str, target: str) -> str:
    return html.link(value, f"{prefix}/{target}") if target and value and (root / target).exists() else value


def text_table(table: Table, compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """The results for a terminal."""
    header, lines = grid(results(table, compared))
    rows = [header, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def comparisons(compared: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Paired tests in words, and a table for each metric."""
    columns = ["compared", "difference", "95% interval", "wins : losses", "p", "p, Holm", "in words"]
    for metric in dict.fromkeys(row["metric"] for row in compared):
        table, test = [], ""
        for row in (row for row in compared if row["metric"] == metric):
            interval = "" if row["low"] is None else f"{row['low']:+.3g} – {row['high']:+.3g}"
            p_values = [f"{row[key]:.2g}" for key in ("p_value", "p_adjusted")]
            pair, counts, test = f"{row['first']} − {row['second']}", f"{row['wins']} : {row['losses']}", row["test"]
            table.append([pair, f"{row['difference']:+.3g}", interval, counts, *p_values, in_words(row)])
        yield html.details(f"{metric}: {len(table)} pairs, {test}", html.table(columns, table, words=len(columns) - 1))


def verdicts(compared: Sequence[Mapping[str, Any]], metric: str = "accuracy_greedy") -> Iterator[str]:
    """What the paired tests of a metric say, in words."""
    found = [row for row in compared if row["metric"] == metric]
    sure = [in_words(row) for row in found if row["p_adjusted"] < LEVEL]
    if found:
        noise = len(found) - len(sure)
        told = "; ".join(sure) + "." if sure else ""
        yield html.note(f"{metric}: {told} {noise} of {len(found)} differences are not distinguishable from noise.")


def other_scores(methods: Table, root: Path) -> Iterator[str]:
    """All scores besides accuracies, a table for each suite with a column for each checkpoint."""
    keys = dict.fromkeys(key for entry in methods.values() for key in entry["scores"])
    for suite in dict.fromkeys(key.partition("/")[0] for key in keys if not key.startswith("accuracy/")):
        table = []
        for key in (key for key in keys if key.startswith(f"{suite}/")):
            metric = key.removeprefix(f"{suite}/")
            cells = [
                _link(_score(entry["scores"].get(key)), root, "..", _rows(suite, metric, name))
                for name, entry in methods.items()
            ]
            table.append([metric, *cells])
        yield f"<h2>{escape(TITLES.get(suite, suite))}</h2>"
        yield html.table(["", *methods], table)
        if suite in NOTES:
            yield html.note(NOTES[suite])


def _rows(suite: str, metric: str, name: str) -> str:
    """Where a score's rows are, seen from the run's folder."""
    if suite == "alpaca_eval":
        return f"judged_{name}@{metric.partition('/')[0]}/{PART}"
    if suite.startswith(LM_EVAL):
        return f"lm_eval_{suite.removeprefix(LM_EVAL)}@{name}/{RESULTS}"
    return f"{'shift' if metric in SHIFTED else 'health'}_{name}/{PART}"


def _score(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    return f"{entry['value']:.3g}" + (f" ({entry['low']:.3g} – {entry['high']:.3g})" if "low" in entry else "")
