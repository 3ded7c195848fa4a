"""Loads the rows of one split: toy problems, questions with answers, or preference pairs."""

import json
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from spo_ray.config.base import RowSource
from spo_ray.config.data import FileData, Location, PairSource, PreferenceData, QuestionFields, ToyData
from spo_ray.data.filter import Contamination
from spo_ray.data.messages import example, text_defect
from spo_ray.data.preference_formats import Preference, preference
from spo_ray.data.read import Raw, inputs, raw_rows
from spo_ray.data.toy import Split, problems
from spo_ray.data.verifiers import load_verifier, verifier_identity, verifier_of
from spo_ray.errors import RowRejectedError, UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, on_hub, require_rows, write_rows
from spo_ray.runtime.run import Run, Stage, Work

PAIR, EXAMPLE = "pair", "sft"
"""Beginning of the ids of pairs, and of rows for SFT."""


def load_data(run: Run, split: Split, against: Artifact | None = None) -> Artifact:
    """Load the questions (:class:`schema.Prompt`) or pairs (:class:`schema.Pair`) of one split.

    With ``data.contamination_words``, rows whose prompts share words with ``against`` are quarantined.

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
        rows = reader(data, split, run.config.seed, counts)
        if words and other:  # before rows are drawn, so that as many are left as were asked for
            template = getattr(data, "prompt", "")
            rows = list(Contamination(other.rows(), words, template).keep_clean(rows, counts))
        drawn = _draw(data, split, run.config.seed, rows)
        counts.kept, counts.read = len(drawn), len(drawn) + len(counts.rejected)
        counts.facts["source"] = "generated"
        if isinstance(data, FileData):
            source = ", ".join(str(place.path) for place, _ in _places(data, split))
            counts.facts |= {"source": source, "not_drawn": len(rows) - len(drawn)}
        require_rows(len(drawn), f"usable {split} rows in the {data.type} data", counts)
        write_rows(out / "part-0.parquet", drawn, kind)

    exclude = {"path", "contamination_words"}
    if not isinstance(data, PreferenceData):  # of pairs, one split depends on the size of the other
        exclude.add("test_questions" if split == "train" else "train_questions")
    settings = data.model_dump(mode="json", exclude={**dict.fromkeys(exclude, True), "more": {"__all__": {"path"}}})
    if run.config.with_scores:
        settings["with_scores"] = True
    places = _places(data, split) if run.mode != "read" else []  # a finished run can be read without its data
    files = [file for place, name in places for file in inputs(place, name).values()]
    sources = {f"file{i or ''}": file for i, file in enumerate(files)}
    if isinstance(data, QuestionFields):
        settings["verifier"] = verifier_identity(verifier_of(data))
    if other:
        settings["contamination_words"], sources["against"] = words, other
    rows, drawn = _bounds(data, split, run.config.seed) if run.mode == "plan" else (None, None)
    work = Work(rows, drawn, note="rows for training" if split == "train" else "rows for evaluation")
    return run.execute(Stage(f"data_{split}", build, settings, sources, work))


def load_examples(run: Run, data: RowSource, against: Artifact) -> Artifact:
    """Load prompts with responses for SFT (:class:`schema.SftExample`).

    With ``data.contamination_words``, rows whose prompts share words with ``against`` are quarantined.

    Raises:
        UserError: a missing file, or one without a usable row.
    """
    own: Any = run.config.data
    words = getattr(own, "contamination_words", None)
    settings: dict[str, Any] = {"train_split": data.train_split}
    sources = {} if run.mode == "read" else inputs(data, data.train_split)
    if words:
        settings["contamination_words"], sources["against"] = words, against

    def build(out: Path, counts: RowCounts) -> None:
        rows: list[Any] = []
        for raw in raw_rows(data, data.train_split):
            try:
                if raw.defect:
                    raise RowRejectedError(raw.defect)
                with whatever_is_wrong():
                    prompt, answer = example(raw.row)
            except RowRejectedError as error:
                counts.reject(raw.name(EXAMPLE), str(error), raw.excerpt)
            else:
                row = {"id": raw.name(EXAMPLE), "prompt": prompt, "responses": [answer["content"]]}
                rows.append(row | {"chosen_extra": answer.get("extra")})
        if words:
            template = getattr(own, "prompt", "")
            rows = list(Contamination(against.rows(), words, template).keep_clean(rows, counts))
        counts.facts["source"] = str(data.path)
        counts.kept, counts.read = len(rows), len(rows) + len(counts.rejected)
        require_rows(len(rows), f"usable rows in sft.data.path={data.path}", counts)
        write_rows(out / "part-0.parquet", rows, schema.SftExample)

    countable = run.mode == "plan" and not on_hub(data.path)
    bound = sum(1 for _ in raw_rows(data, data.train_split)) if countable else None
    return run.execute(Stage("sft_examples", build, settings, sources, Work(bound, note="rows for SFT")))


def _toy(data: ToyData, split: Split, seed: int, counts: RowCounts) -> list[schema.Prompt]:
    """Generate problems; the seed changes only those for training, so that runs can be compared."""
    found = islice(problems(split, seed if split == "train" else 0), _limit(data, split))
    return [{"id": f"{split}-{i:06d}", "prompt": p.question, "gold": p.solution} for i, p in enumerate(found)]


def _questions(data: QuestionFields, split: Split, seed: int, counts: RowCounts) -> list[schema.Prompt]:
    verifier = load_verifier(verifier_of(data))
    found: list[schema.Prompt] = []
    bare: list[str] = []
    for row_id, row, excerpt in _rows(data, split, counts):
        try:
            with whatever_is_wrong():
                prompt, answer = _question(row, data, verifier)
        except RowRejectedError as error:
            counts.reject(row_id, str(error), excerpt)
            bare += [row_id] if isinstance(error, _NoGoldError) else []
        else:
            found.append({"id": row_id, "prompt": prompt, "gold": answer})
    if bare and not data.skip_missing_gold:
        raise UserError(
            f"{data.path}: {len(bare)} questions without a gold answer ('#### N' or a number for GSM8K), first "
            f"{bare[0]}: add them, name their column in data.answer_column, or set data.skip_missing_gold=true to "
            "leave these rows out"
        )
    return found


class _NoGoldError(RowRejectedError):
    """A question has no gold answer, or none that its verifier takes."""


@contextmanager
def whatever_is_wrong() -> Generator[None]:
    """Raise a RowRejectedError for any error while a row is read: a number of 400 digits must not end a run."""
    try:
        yield
    except RowRejectedError:
        raise
    except Exception as error:
        raise RowRejectedError(f"can't be read ({type(error).__name__})") from error


def _question(row: dict[str, Any], data: QuestionFields, verifier: Any) -> tuple[str, str]:
    """Return the prompt of a row and its gold answer.

    Raises:
        RowRejectedError: the row can't be used.
    """
    question, answer = row.get(data.question_column), row.get(data.answer_column)
    if isinstance(answer, int | float):
        answer = str(answer)
    if defect := _defect(row, data, question, answer):
        raise (_NoGoldError if answer is None else RowRejectedError)(defect)
    if answer is None or not verifier.accepts(answer):
        raise _NoGoldError("no gold answer")
    return data.prompt.replace("{question}", str(question)), answer


def _defect(row: dict[str, Any], data: QuestionFields, question: Any, answer: Any) -> str | None:
    """Return the reason why a row can't be used, or None; a missing answer is no defect."""
    for column in (data.question_column, data.answer_column):
        if column not in row:
            return f"no column {column!r}"
    reason = text_defect(question, data.question_column)
    return reason if reason or answer is None else text_defect(answer, data.answer_column, may_be_empty=True)


def read_pair(raw: Raw, source: PairSource, data: PreferenceData, seed: int) -> Preference:
    """Return the preference pair of a row of one of the sources; ``raw.number`` counts over all sources.

    Raises:
        RowRejectedError: the row can't be used.
    """
    if raw.defect:
        raise RowRejectedError(raw.defect)
    columns: Any = source.columns
    with whatever_is_wrong():
        return preference(raw.row, rejected=data.rejected, seed=f"{seed}:{raw.name(PAIR)}", columns=columns)


def _preference(data: PreferenceData, split: Split, seed: int, counts: RowCounts) -> list[schema.Pair]:
    """Return the pairs of a split in random order; if one file split serves for both, the part that is asked for."""
    shared = _held_out_of_train(data)
    own = RowCounts() if shared and split == "test" else counts  # of a shared split, the training data lists the rest
    groups: list[list[Any]] = [[] for _ in data.sources]
    for number, raw in sourced_rows(data, split):
        row_id = raw.name(PAIR)
        try:
            pair = read_pair(raw, data.sources[number], data, seed)
        except RowRejectedError as error:
            own.reject(row_id, str(error), raw.excerpt)
            continue
        source = {"source_id": row_id, "chosen_source": "data", "rejected_source": "data"}
        groups[number].append({"id": row_id} | pair._asdict() | source)
    found = _weighted(groups, [source.weight for source in data.sources], seed)
    own.facts["left_out_by_weight"] = sum(map(len, groups)) - len(found)
    random.Random(seed).shuffle(found)
    if not shared:
        return found
    if len(found) <= data.test_pairs:
        why = f"; {own.why()}" if own.rejected else ""
        raise UserError(
            f"{data.path}: {len(found)} pairs, of which data.test_pairs={data.test_pairs} are held out{why}"
        )
    held_out = _held_out_prompts(found, data)
    return [pair for pair in found if (_prompt(pair) in held_out) == (split == "test")]


READERS: dict[str, tuple[Callable[..., list[Any]], Any]] = {
    "toy": (_toy, schema.Prompt),
    "gsm8k": (_questions, schema.Prompt),
    "questions": (_questions, schema.Prompt),
    "preference": (_preference, schema.Pair),
}
"""Reader and row class by ``data.type``."""


def _held_out_prompts(pairs: Sequence[schema.Pair], data: PreferenceData) -> set[str]:
    """Return the first prompts that have ``test_pairs`` pairs together, or as many as whole prompts can have.

    A prompt on both sides would be known from training.
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
    if not held_out or (len(others) > 1 and sizes[smallest] - left < left):  # one prompt more comes nearer
        held_out.add(smallest)
    return held_out


def _prompt(pair: schema.Pair) -> str:
    return json.dumps(pair["prompt"])


def _rows(data: FileData, split: Split, counts: RowCounts) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (id, row, excerpt) of every row that can be read, and quarantine the others."""
    for _, raw in sourced_rows(data, split):
        if raw.defect:
            counts.reject(raw.name(split), raw.defect, raw.excerpt)
        else:
            yield raw.name(split), raw.row, raw.excerpt


def sourced_rows(data: FileData, split: Split, most: int | None = None) -> Iterator[tuple[int, Raw]]:
    """Yield (number of the source, row) of every row, or the first ``most`` of each; rows are numbered over all."""
    start = 0
    for number, (place, name) in enumerate(_places(data, split)):
        last = -1
        for raw in islice(raw_rows(place, name), most):
            last = raw.number
            yield number, raw._replace(number=start + last)
        start += last + 1


def _places(data: Any, split: Split) -> list[tuple[Location, str]]:
    """Return the places of a split's rows with the split's name there; pairs may be held out of the training split."""
    if not isinstance(data, FileData):
        return []
    train = split == "train" or _held_out_of_train(data)
    return [(place, place.train_split if train else place.test_split) for place in data.sources]


def _weighted(groups: Sequence[list[Any]], weights: Sequence[float | None], seed: int) -> list[Any]:
    """Return random rows of the groups in the ratio of the weights, as many as the smallest allows; else all rows."""
    pairs = [(group, weight) for group, weight in zip(groups, weights, strict=True) if weight is not None]
    if not pairs:
        return [row for group in groups for row in group]
    scale = min(len(group) / weight for group, weight in pairs)
    rng = random.Random(f"weights-{seed}")
    return [row for group, weight in pairs for row in rng.sample(group, min(len(group), round(scale * weight)))]


def _held_out_of_train(data: FileData) -> bool:
    return isinstance(data, PreferenceData) and data.held_out == "from_train"


def _limit(data: Any, split: Split) -> int | None:
    """Return the configured number of rows; None: all."""
    return getattr(data, f"{split}_{'pairs' if isinstance(data, PreferenceData) else 'questions'}")


def _draw(data: Any, split: Split, seed: int, rows: list[Any]) -> list[Any]:
    limit = _limit(data, split)
    if isinstance(data, PreferenceData):  # in random order; held-out pairs are as many as whole prompts have
        return rows if split == "test" and _held_out_of_train(data) else rows[:limit]
    return rows if limit is None or limit >= len(rows) else random.Random(seed).sample(rows, limit)


def _bounds(data: Any, split: Split, seed: int) -> tuple[int | None, int | None]:
    """Return upper bounds of the rows that are read and drawn; None if only a dataset on the hub can tell."""
    limit = _limit(data, split)
    if not isinstance(data, FileData):
        return limit, limit
    if any(on_hub(place.path) for place, _ in _places(data, split)):
        return None, limit
    there = sum(1 for _ in sourced_rows(data, split))
    if _held_out_of_train(data):  # whole prompts are held out: only reading the pairs tells how many they have
        return there, len(_draw(data, split, seed, _preference(data, split, seed, RowCounts())))
    return there, there if limit is None else min(limit, there)
