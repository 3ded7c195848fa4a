"""Turns text into token ids: the last stages before training."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq

from spo_ray.config.data import PreferenceData
from spo_ray.config.model import TemplateConfig
from spo_ray.data.grade import ROWS_PER_SHARD
from spo_ray.data.sources import read_pair, sourced_rows
from spo_ray.errors import RowRejectedError, UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import (
    ROW_TOKENS,
    Artifact,
    Lengths,
    PlannedArtifact,
    RowCounts,
    external,
    on_hub,
    require_rows,
)
from spo_ray.runtime.map_rows import Mapper, Row, each_row, map_shards
from spo_ray.runtime.run import Run, Stage, Work, times
from spo_ray.runtime.schema import SIDES

SAMPLED = 200
"""Rows whose texts a plan tokenises."""
RESPONSE = {"response": "completion_ids"}
"""Column of a response, and the column of its token ids."""


def tokenise_sft(run: Run, source: Artifact) -> Artifact:
    """Tokenise prompts with their responses, or the chosen sides of ready pairs (:class:`schema.SftRow`)."""
    ready = run.config.data.type == "preference" or bool(run.config.sft and run.config.sft.data)
    responses = 1 if ready else run.config.sft_data.responses_per_question
    return _tokenise(run, "sft_tokens", source, RESPONSE, schema.SftRow, responses)


def tokenise_pairs(run: Run, name: str, pairs: Artifact) -> Artifact:
    """Tokenise pairs (:class:`schema.TokenisedPair`)."""
    return _tokenise(run, name, pairs, SIDES, schema.TokenisedPair)


def _tokenise(
    run: Run, name: str, source: Artifact, sides: Mapping[str, str], kind: Any, rows_per_input: int = 1
) -> Artifact:
    from spo_ray.model.adapter import ModelSource  # imports torch, which this file's tasks need not

    config, limit = run.config.model, run.config.train.max_length
    every = sides == RESPONSE and run.config.sft is not None and run.config.sft.loss_on == "every_assistant_turn"
    model = external(ModelSource.of(config).tokenizer)

    def build(out: Path, counts: RowCounts) -> None:
        tokeniser = partial(_tokeniser, str(model.path), config, sides, limit, every)
        map_shards(name, source, out, counts, mapper=tokeniser, kind=kind, batch_size=ROWS_PER_SHARD)
        written = Artifact(out, "")
        require_rows(written.count, f"rows that fit into train.max_length={limit}", counts)
        counts.facts[ROW_TOKENS] = _row_tokens(written, sides)
        differ = sum(written.column("template_differs"))
        counts.facts["template_differs"] = differ
        if differ > config.max_template_mismatch * written.count:
            raise UserError(
                f"{name}: in {differ} of {written.count} rows the chat template, given the whole conversation, gives "
                "other tokens than prompt and completion by themselves (it may trim or rewrite answers): see spo-ray "
                "inspect; if the template is the right one, raise model.max_template_mismatch"
            )

    settings = {"max_length": limit, "template": config.template_settings, "every_turn": every}
    bound = None if every else source.max_rows  # only reading the rows tells how many turns they have
    lengths = _sampled(run, source, sides, model.path, every) if run.mode == "plan" else None
    work = Work(bound, times(bound, rows_per_input), lengths=lengths, cpus=1, note=f"token ids, up to {limit} a row")
    return run.execute(Stage(name, build, settings, {"rows": source, "model": model}, work, resumable=True))


def _row_tokens(written: Artifact, sides: Mapping[str, str]) -> float:
    """Return the mean tokens that a model reads of a row: its prompt with each completion."""
    total = 0
    for part in written.parts:
        for column in ("prompt_ids", *sides.values()):
            chunks = pq.read_table(part, columns=[column])[column].chunks
            total += sum(len(chunk.flatten()) for chunk in chunks) * (len(sides) if column == "prompt_ids" else 1)
    return total / written.count


def _sampled(run: Run, source: Artifact, sides: Mapping[str, str], tokenizer: Path, every: bool) -> Lengths | None:
    """Return the tokens of a row by some texts: of the rows if they are there, else of ready pairs; None: neither."""
    from spo_ray.model.tokenizer import ChatTokenizer, tokenise_row

    config, data, limit = run.config, run.config.data, run.config.train.max_length
    rows: list[Row] = []
    if not isinstance(source, PlannedArtifact):
        batches = (batch for part in source.parts[:1] for batch in pq.ParquetFile(part).iter_batches(SAMPLED))
        rows = [row for batch in islice(batches, 1) for row in batch.to_pylist()]
    elif (
        isinstance(data, PreferenceData)
        and source.path.name != "sft_examples"
        and not any(on_hub(place.path) for place in data.sources)
    ):
        for number, raw in islice(sourced_rows(data, "train", SAMPLED), SAMPLED):
            with suppress(RowRejectedError):
                rows.append(read_pair(raw, data.sources[number], data, config.seed)._asdict() | {"id": ""})
    if not rows:
        return None
    try:
        chat, found = ChatTokenizer.load(str(tokenizer), config.model), []
    except Exception:  # of any kind: the check before every run says what is wrong with the tokenizer
        return None
    if sides == RESPONSE:
        rows = [single for row in rows for single in _single_responses(row, every)]
    for row in rows:
        with suppress(RowRejectedError):
            ids = tokenise_row(chat, row, sides, limit)
            found.append(sum(len(ids["prompt_ids"]) + len(ids[column]) for column in sides.values()))
    return Lengths(fmean(found), sampled=True) if found else None


def _tokeniser(
    model: str, template: TemplateConfig, sides: Mapping[str, str], limit: int, every_turn: bool = False
) -> Mapper:
    from spo_ray.model.tokenizer import ChatTokenizer, tokenise_row

    chat = ChatTokenizer.load(model, template)
    tokenise = each_row(lambda row: [tokenise_row(chat, row, sides, limit)])
    if sides == SIDES:
        return tokenise
    return lambda batch: tokenise([single for row in batch for single in _single_responses(row, every_turn)])


def _single_responses(row: Row, every_turn: bool) -> list[Row]:
    """Return a row for each response, so that one that is too long does not take the question's others along.

    With ``every_turn`` also one for each earlier answer of the assistant, whose prompt is what stands before it.
    """
    prompt, extra = row["prompt"], row.get("chosen_extra")
    answers = [(prompt, text, extra) for text in row.get("responses") or [row["chosen"]]]
    if every_turn and not isinstance(prompt, str):
        earlier = [i for i, turn in enumerate(prompt) if i and turn["role"] == "assistant"]
        answers = [(prompt[:i], prompt[i]["content"], prompt[i].get("extra")) for i in earlier] + answers
    return [
        {"id": f"{row['id']}-{i}", "prompt": before, "response": text, "response_extra": extra}
        for i, (before, text, extra) in enumerate(answers)
    ]
