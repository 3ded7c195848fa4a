"""Turns text into token ids: the last stages before training."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_ray.config.model import TemplateConfig
from spo_ray.data.grade import ROWS_PER_SHARD
from spo_ray.errors import RowRejectedError, UserError
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, external, require_rows
from spo_ray.runtime.map_rows import Mapper, Row, each_row, map_shards
from spo_ray.runtime.run import Run, Stage, Work, times

if TYPE_CHECKING:
    from spo_ray.model.tokenizer import ChatTokenizer

RESPONSE = {"response": "completion_ids"}
SIDES = {"chosen": "chosen_ids", "rejected": "rejected_ids"}
"""Columns of a pair's completions, and the columns of their token ids."""


def tokenise_sft(run: Run, source: Artifact) -> Artifact:
    """Tokenise prompts with their responses, or the chosen sides of ready pairs (:class:`schema.SftRow`)."""
    ready = run.config.data.type == "preference" or bool(run.config.sft and run.config.sft.data)
    responses = 1 if ready else run.config.sft_data.responses_per_question
    return _tokenise(run, "sft_tokens", source, RESPONSE, schema.SftRow, responses)


def tokenise_pairs(run: Run, name: str, pairs: Artifact) -> Artifact:
    """Tokenise pairs (:class:`schema.TokenisedPair`)."""
    return _tokenise(run, name, pairs, SIDES, schema.TokenisedPair)


def tokenise_row(chat: "ChatTokenizer", row: Row, sides: Mapping[str, str], limit: int) -> Row:
    """Return a prompt and its completions as token ids; ``sides`` maps columns of text to columns of token ids.

    A prompt with one completion has at most ``limit`` tokens. Longer rows are dropped, not cut: a cut completion has no
    end-of-turn token, and a model trained on it learns not to stop.

    Raises:
        RowRejectedError: a completion is empty, too long or like the other one, a text contains special tokens, or the
            chat template refuses the conversation.
    """
    prompt = chat.prompt_ids(row["prompt"])
    found: Row = {"id": row["id"], "prompt_ids": prompt, "template_differs": False}
    turns = [row["prompt"]] if isinstance(row["prompt"], str) else [turn["content"] for turn in row["prompt"]]
    if any(chat.has_markup(text + " ") for text in turns):
        raise RowRejectedError("special tokens within the prompt")
    for side, column in sides.items():
        extra = row.get(f"{side}_extra")
        found[column] = chat.answer_ids(row["prompt"], row[side], extra)
        if not found[column]:
            raise RowRejectedError("empty completion")
        if len(prompt) + len(found[column]) > limit:
            raise RowRejectedError(f"longer than train.max_length={limit} tokens")
        if chat.has_markup(row[side]):
            raise RowRejectedError("special tokens within a completion")
        found["template_differs"] |= not extra and chat.is_changed_by_template(row["prompt"], row[side])
    if "chosen_ids" in found and found["chosen_ids"] == found["rejected_ids"]:
        raise RowRejectedError("chosen and rejected are the same")
    return found | {"score_gap": row.get("score_gap")}


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
    work = Work(bound, times(bound, rows_per_input), cpus=1, note=f"token ids, up to {limit} a row")
    return run.execute(Stage(name, build, settings, {"rows": source, "model": model}, work, resumable=True))


def _tokeniser(
    model: str, template: TemplateConfig, sides: Mapping[str, str], limit: int, every_turn: bool = False
) -> Mapper:
    from spo_ray.model.tokenizer import ChatTokenizer

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
