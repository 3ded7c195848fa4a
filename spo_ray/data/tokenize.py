"""Text to token ids: the last stages before training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from spo_ray.errors import RowRejectedError, UserError
from spo_ray.model.completion import TEMPLATE_REFUSES
from spo_ray.runtime import schema
from spo_ray.runtime.artifact import Artifact, RowCounts, external, require_rows
from spo_ray.runtime.map_rows import Mapped, Mapper, Row, each_row, map_shards
from spo_ray.runtime.run import Run, Stage, Work, times

if TYPE_CHECKING:
    from spo_ray.model.tokenizer import ChatTokenizer


ROWS_PER_SHARD = 2000


def tokenise_sft(run: Run, source: Artifact) -> Artifact:
    """SFT questions, or the chosen side of ready pairs, as token ids (:class:`schema.SftRow`)."""
    responses = 1 if run.config.data.type == "preference" else run.config.sft_data.responses_per_question
    return _tokenise(run, "sft_tokens", source, _sft_tokeniser, schema.SftRow, responses)


def tokenise_pairs(run: Run, name: str, pairs: Artifact) -> Artifact:
    """Pairs as token ids (:class:`schema.TokenisedPair`)."""
    return _tokenise(run, name, pairs, _pair_tokeniser, schema.TokenisedPair)


def _tokenise(
    run: Run, name: str, source: Artifact, factory: Callable[..., Mapper], kind: Any, most: int = 1
) -> Artifact:
    config, limit = run.config.model, run.config.train.max_length
    model = external(config.path)

    def build(out: Path, counts: RowCounts) -> None:
        map_shards(
            name,
            source,
            out,
            counts,
            mapper=factory,
            kind=kind,
            batch_size=ROWS_PER_SHARD,
            model=str(model.path),
            chat_template=config.chat_template,
            limit=limit,
        )
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

    settings = {"max_length": limit, "chat_template": config.chat_template}
    bound = source.max_rows
    work = Work(bound, times(bound, most), cpus=1, note=f"token ids, up to {limit} a row")
    return run.execute(Stage(name, build, settings, {"rows": source, "model": model}, work, resumable=True))


def _sft_tokeniser(model: str, chat_template: str | None, limit: int) -> Mapper:
    from spo_ray.model.tokenizer import ChatTokenizer

    chat = ChatTokenizer.load(model, chat_template)

    def mapper(batch: list[Row]) -> Mapped:
        """Each response by itself: one that is too long must not take the others of its question along."""
        return each_row(lambda row: [tokenise_row(chat, row, {"response": "completion_ids"}, limit)])(
            [
                {"id": f"{row['id']}-{i}", "prompt": row["prompt"], "response": response}
                for row in batch
                for i, response in enumerate(row.get("responses") or [row["chosen"]])
            ]
        )

    return mapper


def _pair_tokeniser(model: str, chat_template: str | None, limit: int) -> Mapper:
    from spo_ray.model.tokenizer import ChatTokenizer

    chat = ChatTokenizer.load(model, chat_template)
    sides = {"chosen": "chosen_ids", "rejected": "rejected_ids"}

    def tokenise(row: Row) -> list[Row]:
        found = tokenise_row(chat, row, sides, limit)
        if found["chosen_ids"] == found["rejected_ids"]:
            raise RowRejectedError("chosen and rejected are the same")
        return [found]

    return each_row(tokenise)


def tokenise_row(chat: "ChatTokenizer", row: Row, sides: Mapping[str, str], limit: int) -> Row:
    """A prompt and its completions as token ids.

    Rows are dropped rather than cut: a cut completion has lost its end-of-turn token, and training on it teaches the
    model never to stop.

    Args:
        chat: the tokenizer.
        row: ``id``, ``prompt``, and completions.
        sides: the completions' columns, and those of their ids.
        limit: tokens of the longest prompt and completion.

    Raises:
        RowRejectedError: an empty completion, one that is too long, or special tokens within the text.
    """
    try:
        prompt = chat.prompt_ids(row["prompt"])
    except TemplateError as error:
        raise RowRejectedError(f"{TEMPLATE_REFUSES}: {error}") from error
    found: Row = {"id": row["id"], "prompt_ids": prompt, "template_differs": False}
    turns = [row["prompt"]] if isinstance(row["prompt"], str) else [turn["content"] for turn in row["prompt"]]
    if any(chat.has_markup(text + " ") for text in turns):
        raise RowRejectedError("special tokens within the prompt")
    for side, column in sides.items():
        found[column] = chat.completion_ids(row[side])
        if not found[column]:
            raise RowRejectedError("empty completion")
        if len(prompt) + len(found[column]) > limit:
            raise RowRejectedError(f"longer than train.max_length={limit} tokens")
        if chat.has_markup(row[side]):
            raise RowRejectedError("special tokens within a completion")
        found["template_differs"] |= chat.is_changed_by_template(row["prompt"], row[side])
    return found
