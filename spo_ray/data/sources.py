"""Where questions and ready pairs come from: the toy task, GSM8K, preference files."""

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spo_ray import rows
from spo_ray.config import Gsm8kData, PreferenceData, ToyData
from spo_ray.core.scoring import gold_answer
from spo_ray.data.toy import problems
from spo_ray.errors import UserError
from spo_ray.run import Artifact, Ledger, Run, external, require_rows, write_rows

Split = Literal["train", "test"]


def load_data(run: Run, split: Split) -> Artifact:
    """The questions (:class:`rows.Prompt`) or pairs (:class:`rows.Pair`) of one split.

    Raises:
        UserError: a missing or empty file, or questions without a gold answer.
    """
    data = run.config.data
    reader, kind = READERS[data.type]

    def build(out: Path, ledger: Ledger) -> None:
        table = list(reader(data, split, run.config.seed, ledger))
        ledger.kept = len(table)
        ledger.read = len(table) + len(ledger.rejected)
        ledger.facts["source"] = "generated" if isinstance(data, ToyData) else str(data.path)
        require_rows(table, f"usable {split} rows in the {data.type} data")
        write_rows(out / "part-0.parquet", table, kind)

    settings = data.model_dump(mode="json", exclude={"path"})
    if not isinstance(data, PreferenceData):  # there one split depends on the other's size
        settings.pop("test_questions" if split == "train" else "train_questions")
    inputs = {} if isinstance(data, ToyData) else {"file": external(_file(data.path, _stem(data, split)))}
    return run.stage(f"data_{split}", build, config=settings, inputs=inputs)


def _toy(data: ToyData, split: Split, seed: int, ledger: Ledger) -> Iterator[rows.Prompt]:
    """Training problems change with the seed; the held-out ones never do, so that runs can be compared."""
    count = data.train_questions if split == "train" else data.test_questions
    for i, problem in enumerate(islice(problems(split, seed if split == "train" else 0), count)):
        yield {"id": f"{split}-{i:06d}", "prompt": problem.question, "gold": problem.solution}


def _gsm8k(data: Gsm8kData, split: Split, seed: int, ledger: Ledger) -> Iterator[rows.Prompt]:
    file = _file(data.path, split)
    found: list[rows.Prompt] = []
    bare: list[str] = []
    for row_id, row in _jsonl(file, split, ("question", "answer"), ledger, may_be_empty="answer"):
        if gold_answer(row["answer"]) is None:
            bare.append(row_id)
            ledger.reject(row_id, "no gold answer", row)
            continue
        found.append({"id": row_id, "prompt": row["question"], "gold": row["answer"]})
    if bare and not data.skip_missing_gold:
        raise UserError(
            f"{file}: {len(bare)} questions without a gold answer ('#### N' or a number), first "
            f"{bare[0]}: add them, or set data.skip_missing_gold=true to leave these rows out"
        )
    return iter(_choose(found, data.train_questions if split == "train" else data.test_questions, seed))


def _preference(data: PreferenceData, split: Split, seed: int, ledger: Ledger) -> Iterator[rows.Pair]:
    """One file serves both splits: a seeded shuffle holds out the first ``test_pairs``."""
    columns = ("prompt", "chosen", "rejected")
    found: list[Any] = [{"id": i} | row for i, row in _jsonl(_file(data.path, "train"), "pair", columns, ledger)]
    if len(found) <= data.test_pairs:
        raise UserError(f"{data.path}: {len(found)} pairs, of which data.test_pairs={data.test_pairs} are held out")
    random.Random(seed).shuffle(found)
    if split == "test":
        return iter(found[: data.test_pairs])
    return iter(found[data.test_pairs :][: data.train_pairs])


READERS: dict[str, tuple[Callable[..., Iterator[Any]], Any]] = {
    "toy": (_toy, rows.Prompt),
    "gsm8k": (_gsm8k, rows.Prompt),
    "preference": (_preference, rows.Pair),
}


def _stem(data: Gsm8kData | PreferenceData, split: Split) -> str:
    return "train" if isinstance(data, PreferenceData) else split


def _file(path: Path, stem: str) -> Path:
    file = path / f"{stem}.jsonl"
    if not file.is_file():
        raise UserError(f"no data file {file}: set data.path to a folder with {stem}.jsonl")
    return file


def _jsonl(
    file: Path, prefix: str, columns: tuple[str, ...], ledger: Ledger, may_be_empty: str | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """(id, row) of every usable line; the others go to the ledger with their reason."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            row_id = f"{prefix}-{number:06d}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                ledger.reject(row_id, "not JSON", line)
                continue
            reason = _defect(row, columns, may_be_empty)
            if reason:
                ledger.reject(row_id, reason, line)
            else:
                yield row_id, {column: row[column] for column in columns}


def _defect(row: Any, columns: tuple[str, ...], may_be_empty: str | None) -> str | None:
    if not isinstance(row, dict):
        return "not a JSON object"
    for column in columns:
        if column not in row:
            return f"no column {column!r}"
        if not isinstance(row[column], str):
            return f"{column!r} is no text"
        if not row[column].strip() and column != may_be_empty:
            return f"{column!r} is empty"
        try:
            row[column].encode()
        except UnicodeEncodeError:
            return f"{column!r} is not valid Unicode"
    return None


def _choose(found: list[Any], count: int | None, seed: int) -> list[Any]:
    return found if count is None or count >= len(found) else random.Random(seed).sample(found, count)
