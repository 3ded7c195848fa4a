"""AlpacaEval's win rates, computed by the ``alpaca_eval`` package."""

import json
import socket
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from spo_ray.errors import UserError

LengthControl = Literal["minimal", "v1"]
NEEDED = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "preference")
FEWEST = 10
"""Smallest number of judged outputs for a length-controlled win rate, which is fitted with 5-fold cross-validation."""
CONNECT_S = 3.0
"""Timeout (seconds) of the check that the hub can be reached."""


def read_records(file: Path, kind: str, setting: str = "") -> list[Any]:
    """Return the records of a JSON or JSON Lines file; ``kind`` and ``setting`` are for error messages.

    Raises:
        UserError: the file can't be read, or holds no list.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        records = [json.loads(line) for line in lines] if file.suffix == ".jsonl" else json.loads(text)
    except OSError as error:
        raise UserError(f"{setting}{file} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise UserError(f"{file} must hold a list of {kind}")
    return records


def read_annotations(file: Path) -> list[dict[str, Any]]:
    """Return AlpacaEval's annotation records.

    Raises:
        UserError: the file can't be read, or a record lacks a field.
    """
    records = read_records(file, "annotation records")
    for number, record in enumerate(records):
        missing = [key for key in NEEDED if not isinstance(record, dict) or key not in record]
        if missing:
            raise UserError(f"{file}: record {number} has no {missing[0]!r}: give AlpacaEval's annotations.json")
        defect = _defect(record)
        if defect:
            raise UserError(f"{file}: record {number}: {defect}")
    for key in ("generator_1", "generator_2"):
        names = {str(record[key]) for record in records}
        if len(names) > 1:
            raise UserError(f"{file}: {key} must be the same in every record, there are {', '.join(sorted(names)[:3])}")
    return records


def _defect(record: dict[str, Any]) -> str | None:
    if not all(isinstance(record[key], str) for key in ("output_1", "output_2")):
        return "output_1 and output_2 must be text"
    preference = record["preference"]
    if isinstance(preference, bool) or not isinstance(preference, int | float | None):
        return f"preference is {preference!r}, no number"
    if preference is None or preference == 0 or 1 <= preference <= 2 or preference != preference:
        return None
    return f"preference is {preference}, neither 0 (a draw) nor between 1 and 2"


def win_rates(records: Sequence[dict[str, Any]], control: LengthControl = "minimal") -> dict[str, Any]:
    """Return the win rates of output_2 over output_1 in percent, over the judged records; draws count half.

    ``lc_method`` is the formula of ``length_controlled_win_rate``: ``length_controlled_v1``, the leaderboard's, needs a
    table from the hub; ``length_controlled_minimal`` does not, and differs by up to 20 points for weak models. The rate
    is None if there are too few judged records, or all outputs have the same length. v1 needs records in the order of
    AlpacaEval's own instructions, or with their position there as ``index``.

    Raises:
        UserError: no record is judged.
    """
    import pandas as pd
    from alpaca_eval.metrics import get_winrate

    places = [record.get("index", number) for number, record in enumerate(records)]
    table = pd.DataFrame.from_records(list(records), index=places).drop(columns="index", errors="ignore")
    table["preference"] = table["preference"].astype(float)
    judged = table[table["preference"].notna()]
    if judged.empty:
        raise UserError("no record has a preference: nothing was judged")
    found = get_winrate(judged)
    controlled, control = _length_controlled(judged, effective(control))
    return {
        "win_rate": float(found["win_rate"]),
        "standard_error": float(found["standard_error"]) if len(judged) > 1 else None,
        "discrete_win_rate": float(found["discrete_win_rate"]),
        "length_controlled_win_rate": controlled,
        "lc_method": f"length_controlled_{control}",
        "n_total": int(found["n_total"]),
        "unjudged": len(table) - len(judged),
    }


def effective(control: LengthControl) -> LengthControl:
    """Return the formula that can be used: v1 only if its table can be read."""
    return "v1" if control == "v1" and _table_within_reach() else "minimal"


def _length_controlled(judged: Any, control: LengthControl) -> tuple[float | None, LengthControl]:
    """Return the rate and its formula; the minimal one is fitted here because the package needs the table for both."""
    from alpaca_eval.metrics import get_length_controlled_winrate, glm_winrate

    lengths = judged["output_1"].str.len() - judged["output_2"].str.len()
    if len(judged) < FEWEST or not lengths.std():
        return None, control
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about future versions of scikit-learn, and large differences
        if control == "v1":
            with suppress(OSError, KeyError):  # the hub refuses, or the instructions are not AlpacaEval's
                found = get_length_controlled_winrate(judged, save_weights_dir=None, is_warn_extreme_changes=False)
                return float(found["length_controlled_winrate"]), "v1"
        formula: Any = glm_winrate.GLM_INFO["length_controlled_minimal"]
        table = judged[["preference"]].replace({0.0: 1.5}) - 1
        table["std_delta_len"], table["not_gamed_baseline"] = lengths / lengths.std(), True
        same_length = table[["not_gamed_baseline"]].assign(std_delta_len=0)
        x, x_same = glm_winrate.make_dmatrix_for_model(table, same_length, formula=formula["formula"])
        model = glm_winrate.fit_LogisticRegressionCV(x, "preference", **formula["kwargs"])
        return float(model.predict_proba(x_same)[:, 1].mean() * 100), "minimal"


def _table_within_reach() -> bool:
    """Return True if the table of instruction difficulties is cached or the hub is reachable.

    The hub's client would retry for minutes.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    name = {"repo_id": "tatsu-lab/alpaca_eval", "filename": "df_gamed.csv", "repo_type": "dataset"}
    if isinstance(try_to_load_from_cache(**name), str):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True
