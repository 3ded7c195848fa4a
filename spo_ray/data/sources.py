"""Where questions and ready pairs come from: the toy task, questions with answers, preference data."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spo_ray.config.data import FileData, PreferenceData, QuestionFields, ToyData
from spo_ray.data.filter import Contamination
from spo_ray.data.preference_formats import preference, text_defect
from spo_ray.data.read import inputs, raw_rows
from spo_ray.data.toy import problems
from spo_ray.data.verifiers import load_verifier, verifier_identity, verifier_of
from spo_ray.errors import RowRejectedError, UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, on_hub, require_rows, write_rows
from spo_ray.runtime.run import Run, Stage, Work

Split = Literal["train", "test"]
PAIR = "pair"
"""What pairs' ids begin with."""
Keep = Callable[[Iterable[Any]], list[Any]]
"""Leaves out rows that come up in the test, before rows are drawn."""


def load_data(run: Run, split: Split, against: Artifact | None = None) -> Artifact:
    """The questions (:class:`schema.Prompt`) or pairs (:class:`schema.Pair`) of one split.

    With ``data.contamination_words``, rows whose prompts come up in ``against`` are quarantined.

    Raises:
        UserError: a missing or empty file, or questions without a gold answer.
    """
    data = run.config.data
    reader, kind = READERS[data.type]
    words = data.contamination_words if isinstance(data, FileData) else None
    other = against if words else None
    if run.mode != "read" and isinstance(data, FileData) and data.path.is_file() and not _held_out_of_train(data):
        raise UserError(f"data.path={data.path} is one file, for training and for the test: name a folder with both")

    def build(out: Path, counts: RowCounts) -> None:
        keep: Keep = list
        if words and other:
            found = Contamination(other.rows(), words, getattr(data, "prompt", ""))
            keep = lambda table: list(found.keep_clean(table, counts))  # noqa: E731
        kept = list(reader(data, split, run.config.seed, counts, keep))
        counts.kept = len(kept)
        counts.read = len(kept) + len(counts.rejected)
        counts.facts["source"] = str(data.path) if isinstance(data, FileData) else "generated"
        require_rows(len(kept), f"usable {split} rows in the {data.type} data", counts)
        write_rows(out / "part-0.parquet", kept, kind)

    exclude = {"path", "contamination_words"}
    if not isinstance(data, PreferenceData):  # there one split depends on the other's size
        exclude.add("test_questions" if split == "train" else "train_questions")
    settings = data.model_dump(mode="json", exclude=exclude)
    sources = {}
    if isinstance(data, FileData) and run.mode != "read":  # a finished run can be read without its data
        sources = inputs(data, _file_split(data, split))
    if isinstance(data, QuestionFields):
        settings["verifier"] = verifier_identity(verifier_of(data))
    if other:
        settings["contamination_words"], sources["against"] = words, other
    rows, drawn = _count(data, split, run.config.seed) if run.mode == "plan" else (None, None)
    work = Work(rows, drawn, note="rows for training" if split == "train" else "rows for evaluation")
    return run.execute(Stage(f"data_{split}", build, settings, sources, work))


def _count(data: Any, split: Split, seed: int) -> tuple[int | None, int | None]:
    """Return upper bounds of the rows that are read and drawn; None where a dataset on the hub has to tell."""
    if not isinstance(data, FileData):
        count = data.train_questions if split == "train" else data.test_questions
        return count, count
    limit: int | None = getattr(data, f"{split}_{'pairs' if isinstance(data, PreferenceData) else 'questions'}")
    if on_hub(data.path):
        return None, limit
    there = sum(1 for _ in raw_rows(data, _file_split(data, split)))
    if _held_out_of_train(data):  # whole prompts are held out: only reading the pairs tells how many these have
        return there, len(list(_preference(data, split, seed, RowCounts(), list)))
    return there, there if limit is None else min(limit, there)


def _toy(data: ToyData, split: Split, seed: int, counts: RowCounts, keep: Keep) -> Iterator[schema.Prompt]:
    """Training problems change with the seed; the held-out ones never do, so that runs can be compared."""
    count = data.train_questions if split == "train" else data.test_questions
    for i, problem in enumerate(islice(problems(split, seed if split == "train" else 0), count)):
        yield {"id": f"{split}-{i:06d}", "prompt": problem.question, "gold": problem.solution}


def _questions(data: QuestionFields, split: Split, seed: int, counts: RowCounts, keep: Keep) -> Iterator[schema.Prompt]:
    verifier = load_verifier(verifier_of(data))
    found: list[schema.Prompt] = []
    bare: list[str] = []
    for row_id, row, excerpt in _rows(data, _file_split(data, split), split, counts):
        question, answer = row.get(data.question_column), row.get(data.answer_column)
        if isinstance(answer, int | float):
            answer = str(answer)
        defect = _defect(row, data, question, answer)
        if answer is None:
            bare.append(row_id)
            counts.reject(row_id, defect or "no gold answer", excerpt)
        elif defect:
            counts.reject(row_id, defect, excerpt)
        elif verifier.accepts(str(answer)):
            prompt = data.prompt.replace("{question}", str(question))
            found.append({"id": row_id, "prompt": prompt, "gold": str(answer)})
        else:
            bare.append(row_id)
            counts.reject(row_id, "no gold answer", excerpt)
    if bare and not data.skip_missing_gold:
        raise UserError(
            f"{data.path}: {len(bare)} questions without a gold answer ('#### N' or a number for GSM8K), first "
            f"{bare[0]}: add them, name their column in data.answer_column, or set data.skip_missing_gold=true to "
            "leave these rows out"
        )
    clean, count = keep(found), data.train_questions if split == "train" else data.test_questions
    drawn = clean if count is None or count >= len(clean) else random.Random(seed).sample(clean, count)
    counts.facts["not_drawn"] = len(clean) - len(drawn)
    return iter(drawn)


def _defect(row: dict[str, Any], data: QuestionFields, question: Any, answer: Any) -> str | None:
    missing = [column for column in (data.question_column, data.answer_column) if column not in row]
    if missing:
        return f"no column {missing[0]!r}"
    reason = text_defect(question, data.question_column)
    return reason if reason or answer is None else text_defect(answer, data.answer_column, may_be_empty=True)


def _preference(data: PreferenceData, split: Split, seed: int, counts: RowCounts, keep: Keep) -> Iterator[schema.Pair]:
    """One split may serve for both: a seeded shuffle holds out the first prompts with ``test_pairs`` pairs."""
    found: list[Any] = []
    for row_id, row, excerpt in _rows(data, _file_split(data, split), PAIR, counts):
        try:
            pair = preference(row, rejected=data.rejected, seed=f"{seed}:{row_id}")
        except RowRejectedError as error:
            counts.reject(row_id, str(error), excerpt)
            continue
        source = {"source_id": row_id, "chosen_source": "data", "rejected_source": "data"}
        found.append({"id": row_id} | pair._asdict() | source)
    random.Random(seed).shuffle(found)
    if _held_out_of_train(data):
        if len(found) <= data.test_pairs:
            why = counts.why()
            raise UserError(
                f"{data.path}: {len(found)} pairs, of which data.test_pairs={data.test_pairs} are held out"
                + (f"; {why}" if why else "")
            )
        held_out = _held_out_prompts(found, data)
        found = [pair for pair in found if (_prompt(pair) in held_out) == (split == "test")]
    clean = keep(found)
    most = data.train_pairs if split == "train" else None if _held_out_of_train(data) else data.test_pairs
    drawn = clean[:most]
    counts.facts["not_drawn"] = len(clean) - len(drawn)
    return iter(drawn)


def _held_out_prompts(pairs: Sequence[Any], data: PreferenceData) -> set[str]:
    """The first prompts that have ``test_pairs`` pairs together, or as many as whole prompts can have.

    A prompt that stood on both sides would be known from training.
    """
    sizes = Counter(map(_prompt, pairs))  # in the order of the pairs
    if len(sizes) == 1:
        raise UserError(f"{data.path}: all {len(pairs)} pairs have the same prompt, so that none can be held out")
    left, held_out = data.test_pairs, set()
    for prompt, size in sizes.items():
        if size <= left:
            held_out.add(prompt)
            left -= size
    others = [prompt for prompt in sizes if prompt not in held_out]
    smallest = min(others, key=lambda prompt: sizes[prompt])
    if not held_out or (len(others) > 1 and sizes[smallest] - left < left):  # a few more are nearer
        held_out.add(smallest)
    return held_out


def _prompt(pair: Any) -> str:
    return json.dumps(pair["prompt"])


READERS: dict[str, tuple[Callable[..., Iterator[Any]], Any]] = {
    "toy": (_toy, schema.Prompt),
    "gsm8k": (_questions, schema.Prompt),
    "questions": (_questions, schema.Prompt),
    "preference": (_preference, schema.Pair),
}


def _file_split(data: FileData, split: Split) -> str:
    """What the split is called in the data; pairs may be held out of the training split."""
    return data.train_split if split == "train" or _held_out_of_train(data) else data.test_split


def _held_out_of_train(data: FileData) -> bool:
    return isinstance(data, PreferenceData) and data.held_out == "from_train"


def _rows(data: FileData, split: str, prefix: str, counts: RowCounts) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(id, row, excerpt) of every row that can be read; the others go to the counts."""
    for raw in raw_rows(data, split):
        row_id = raw.name(prefix)
        if raw.defect:
            counts.reject(row_id, raw.defect, raw.excerpt)
        else:
            yield row_id, raw.row, raw.excerpt
