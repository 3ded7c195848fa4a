"""``spo-ray score``: grade files of responses that were made elsewhere."""

import json
from pathlib import Path
from typing import Any

from spo_ray.data.gsm8k import gold_answer
from spo_ray.data.read import NOT_UTF8, misread, open_lines
from spo_ray.data.verifiers import load_verifier
from spo_ray.errors import UserError


def score_gsm8k(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Grade rows with ``question``, ``answer`` (GSM8K's format or a number) and ``response``.

    ``FILE.scored.jsonl`` gets every usable row with ``correct`` (the last number, however it is written), ``extracted``
    and ``strict_correct`` (behind ``####``).

    Returns:
        ``(n, accuracy and strict_accuracy over the usable rows; what was left out, with line numbers)``.

    Raises:
        UserError: no such file, or no usable row in it.
    """
    verifier, defects = load_verifier("gsm8k"), []
    n = correct = strict = 0
    target = file.with_suffix(".scored.jsonl")
    try:
        source = open_lines(file)
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from error
    temporary = target.with_name(f".{target.name}")
    with source, temporary.open("w", encoding="utf-8") as out:
        for number, line in enumerate(source, 1):
            if not line.strip():
                continue
            row = NOT_UTF8 if misread(line) else _row(line)
            if isinstance(row, str):
                defects.append(f"line {number}: {row}")
                continue
            grade = verifier.grade(row["response"], str(row["answer"]))
            found = {"correct": grade.correct, "extracted": grade.extracted, "strict_correct": grade.strict}
            out.write(json.dumps(row | found, ensure_ascii=True) + "\n")
            n, correct, strict = n + 1, correct + grade.correct, strict + grade.strict
    if not n:
        temporary.unlink()
        raise UserError(f"no usable row in {file}: " + ("; ".join(defects[:3]) or "it is empty"))
    temporary.replace(target)
    return {"n": n, "accuracy": correct / n, "strict_accuracy": strict / n}, defects


def _row(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(row, dict):
        return "not a JSON object"
    missing = [column for column in ("question", "answer", "response") if column not in row]
    if missing:
        return f"no column {missing[0]!r}"
    if not isinstance(row["response"], str):
        return "'response' is no text"
    answer = row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or str(answer) in ("nan", "inf", "-inf"):
        return "'answer' is neither text nor a number"
    return row if gold_answer(str(answer)) is not None else "no gold answer"
