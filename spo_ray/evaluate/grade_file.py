"""``spo-ray score gsm8k``: grades a file of responses that were generated elsewhere."""

import json
from pathlib import Path
from typing import Any

from spo_ray.data.gsm8k import gold_answer
from spo_ray.data.read import read_jsonl
from spo_ray.data.verifiers import load_verifier
from spo_ray.errors import UserError
from spo_ray.runtime.artifact import write_answer


def score_gsm8k(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Grade rows with ``question``, ``answer`` (GSM8K's format or a number) and ``response``.

    ``FILE.scored.jsonl`` gets every usable row with ``correct`` (the last number, however it is written), ``extracted``
    and ``strict_correct`` (behind ``####``).

    Returns:
        ``(n, accuracy and strict_accuracy over the usable rows; what was left out, with line numbers)``.

    Raises:
        UserError: no such file, or no usable row in it.
    """
    verifier, scored, defects = load_verifier("gsm8k"), [], []
    try:
        source = list(read_jsonl(file))
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from error
    for raw in source:
        row, defect = raw.row, raw.defect or _defect(raw.row)
        if defect:
            defects.append(f"line {raw.number + 1}: {defect}")
            continue
        grade = verifier.grade(row["response"], str(row["answer"]))
        found = {"correct": grade.correct, "extracted": grade.extracted, "strict_correct": grade.strict}
        scored.append(row | found)
    if not scored:
        raise UserError(f"no usable row in {file}: " + ("; ".join(defects[:3]) or "it is empty"))
    write_answer(file.with_suffix(".scored.jsonl"), "".join(json.dumps(row) + "\n" for row in scored))
    n, shares = len(scored), {"accuracy": "correct", "strict_accuracy": "strict_correct"}
    return {"n": n} | {name: sum(row[key] for row in scored) / n for name, key in shares.items()}, defects


def _defect(row: dict[str, Any]) -> str | None:
    missing = [column for column in ("question", "answer", "response") if column not in row]
    if missing:
        return f"no column {missing[0]!r}"
    if not isinstance(row["response"], str):
        return "'response' is no text"
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or str(answer) in ("nan", "inf", "-inf"):
        return "'answer' is neither text nor a number"
    return None if gold_answer(str(answer)) is not None else "no gold answer"
