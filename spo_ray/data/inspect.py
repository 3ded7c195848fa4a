"""``spo-ray inspect``: shows preference data as training sees it, token by token."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from spo_ray.config.data import PreferenceData
from spo_ray.config.schema import Config
from spo_ray.data.filter import pair_check
from spo_ray.data.preference_formats import unread
from spo_ray.data.sources import read_pair, sourced_rows
from spo_ray.errors import RowRejectedError, UserError
from spo_ray.model.adapter import ModelSource
from spo_ray.model.collate import rows_at_once
from spo_ray.model.displacement import ches_scores
from spo_ray.model.load import load_model
from spo_ray.model.tokenizer import ChatTokenizer, tokenise_row
from spo_ray.runtime.console import visible
from spo_ray.runtime.schema import SIDES

COLUMNS = {"prompt": "prompt_ids", **SIDES}
COLOURS = {"prompt": ("dim", "dim underline"), "chosen": ("green", "bold green"), "rejected": ("red", "bold red")}
"""Styles of the tokens of a text; they alternate to show where a token ends."""
LOOKED_AT = 1000
"""Rows that are read of each source."""
QUANTILES = {"median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}
EXCERPT = 400
"""Tokens shown at each end of a long text."""
LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8, which can be a token each."""


def inspect_data(config: Config, data: Path | None, rows: int, console: Console, displacement: bool = False) -> None:
    """Print some rows, then the lengths and the drop reasons of the first thousand.

    With ``displacement`` also the pairs with the highest CHES scores (:mod:`spo_ray.model.displacement`).

    Raises:
        UserError: the data can't be read, or no row can be used.
    """
    section = config.data if isinstance(config.data, PreferenceData) else None
    if data is not None:
        section = (section or PreferenceData(path=data)).model_copy(update={"path": data, "more": [], "weight": None})
    if section is None:
        raise UserError("inspect shows preference data: name it with --data, or give a configuration that has some")
    base = ModelSource.of(config.model)
    chat, limit = ChatTokenizer.load(base.tokenizer, config.model, base.model), config.train.max_length
    reasons, check = Counter[str](), pair_check(config.pairs, config.with_scores)
    tokenised: list[dict[str, Any]] = []
    unused: set[str] = set()
    for number, raw in sourced_rows(section, "train", LOOKED_AT):
        source = section.sources[number]
        columns: Any = source.columns
        unused |= unread(raw.row, columns)
        try:
            row = read_pair(raw, source, section, config.seed)._asdict() | {"id": str(raw.number)}
            reason, _ = check(row)
            if reason:
                raise RowRejectedError(reason)
            found = tokenise_row(chat, row, SIDES, limit)
        except RowRejectedError as error:
            reasons[str(error)] += 1
            continue
        tokenised.append(found)
        if len(tokenised) <= rows:
            _show(console, chat, found)
    _summary(console, tokenised, reasons, config)
    if unused:
        console.print(f"columns that are not used: {', '.join(sorted(unused))}", markup=False)
    if advice := chat.advice():
        console.print(advice, markup=False)
    if not tokenised:
        raise UserError("no row can be used: the reasons are above")
    if displacement:
        _show_displacement(console, chat, tokenised, rows, config)


def _show_displacement(
    console: Console, chat: ChatTokenizer, tokenised: list[dict[str, Any]], rows: int, config: Config
) -> None:
    source = ModelSource.of(config.model)
    if source.adapter is not None:
        raise UserError(
            "--displacement needs a model without an adapter: run with --until data, and name its base_model"
        )
    model, size = load_model(source.model).eval(), rows_at_once(config.train.max_length)
    scores = ches_scores(model, tokenised, chat.pad_id, size)
    ranked = sorted(zip(scores, tokenised, strict=True), key=lambda found: -getattr(found[0], config.pairs.ches))
    console.rule("CHES scores (and per token), the highest first: these pairs lower log pi(chosen) most")
    for score, row in ranked[:rows]:
        line = f"row {row['id']}: {score.ches:.4g} ({score.ches_per_token:.4g})"
        texts = [f"{side}: {chat.decode(row[column])[:EXCERPT]!r}" for side, column in SIDES.items()]
        console.print("\n  ".join([line, *texts]), markup=False)


def _show(console: Console, chat: ChatTokenizer, row: dict[str, Any]) -> None:
    console.rule(f"row {row['id']}")
    for side, column in COLUMNS.items():
        ids = row[column]
        mask = f"mask 0 x {len(ids)}" if side == "prompt" else f"mask 0 x {len(row['prompt_ids'])}, 1 x {len(ids)}"
        console.print(Text(f"{side}: {len(ids)} tokens, {mask}", style="bold"))
        console.print(_tokens(chat, ids, COLOURS[side]))


def _tokens(chat: ChatTokenizer, ids: Sequence[int], colours: tuple[str, str]) -> Text:
    text, cut, pending = Text(), range(EXCERPT, len(ids) - EXCERPT), []
    for i, token in enumerate(ids):
        if i not in cut:
            pending.append(token)
            shown, last = str(chat.tokenizer.decode(pending)), i in (len(ids) - 1, EXCERPT - 1)
            if shown.endswith("\ufffd") and not last and len(pending) < LONGEST_CHARACTER:
                continue  # the next tokens have the rest of the character
            special = token in chat.tokenizer.all_special_ids or token == chat.end_id
            text.append(visible(shown), "reverse" if special else colours[i % 2])
            pending = []
        elif i == EXCERPT:
            text.append(f" ... {len(cut)} tokens ... ", "italic")
    return text


def _summary(console: Console, tokenised: Sequence[dict[str, Any]], reasons: Counter[str], config: Config) -> None:
    read = len(tokenised) + sum(reasons.values())
    console.rule(f"{read} rows")
    for side, column in COLUMNS.items():
        lengths = sorted(len(row[column]) for row in tokenised)
        if lengths:
            at = {name: lengths[min(len(lengths) - 1, int(q * len(lengths)))] for name, q in QUANTILES.items()}
            console.print(f"{side} tokens: " + ", ".join(f"{name} {value}" for name, value in at.items()))
    long = sum(n for reason, n in reasons.items() if reason.startswith("longer than"))
    differ = sum(row["template_differs"] for row in tokenised)
    limit = f"max_length ({config.train.max_length})"
    console.print(f"{long} of {read} rows dropped for exceeding {limit}. Rows are never truncated.")
    console.print(f"In {differ} of {len(tokenised)} rows the chat template changes the answer's tokens.")
    for reason, count in reasons.most_common():
        console.print(visible(f"dropped: {count} ({reason})"))
