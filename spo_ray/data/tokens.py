"""Text to token ids: the last stages before training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo_ray import rows
from spo_ray.run import Artifact, Ledger, Run, external, require_rows
from spo_ray.shards import Mapped, Mapper, Row, RowRejectedError, each_row, map_shards

ROWS_PER_SHARD = 2000


def tokenise_sft(run: Run, source: Artifact) -> Artifact:
    """SFT questions, or the chosen side of ready pairs, as token ids (:class:`rows.SftRow`)."""
    return _tokenise(run, "sft_tokens", source, _sft_tokeniser, rows.SftRow)


def tokenise_pairs(run: Run, name: str, pairs: Artifact) -> Artifact:
    """Pairs as token ids (:class:`rows.TokenisedPair`)."""
    return _tokenise(run, name, pairs, _pair_tokeniser, rows.TokenisedPair)


def _tokenise(run: Run, name: str, source: Artifact, factory: Callable[..., Mapper], kind: Any) -> Artifact:
    config, limit = run.config.model, run.config.train.max_length
    model = external(config.path)

    def build(out: Path, ledger: Ledger) -> None:
        map_shards(
            name,
            source,
            out,
            ledger,
            mapper=factory,
            kind=kind,
            batch_size=ROWS_PER_SHARD,
            model=str(model.path),
            chat_template=config.chat_template,
            limit=limit,
        )
        require_rows(Artifact(out, "").count, f"rows that fit into train.max_length={limit}")

    settings = {"max_length": limit, "chat_template": config.chat_template}
    return run.stage(name, build, config=settings, inputs={"rows": source, "model": model})


def _sft_tokeniser(model: str, chat_template: str | None, limit: int) -> Mapper:
    from spo_ray.model.tokenise import ChatTokenizer

    chat = ChatTokenizer.load(model, chat_template)

    def tokenise(row: Row) -> list[Row]:
        prompt = chat.prompt_ids(row["prompt"])
        completion = _checked(prompt, chat.completion_ids(row["response"]), limit)
        return [{"id": row["id"], "prompt_ids": prompt, "completion_ids": completion}]

    def mapper(batch: list[Row]) -> Mapped:
        """Each response by itself: one that is too long must not take the others of its question along."""
        return each_row(tokenise)(
            [
                {"id": f"{row['id']}-{i}", "prompt": row["prompt"], "response": response}
                for row in batch
                for i, response in enumerate(row.get("responses") or [row["chosen"]])
            ]
        )

    return mapper


def _pair_tokeniser(model: str, chat_template: str | None, limit: int) -> Mapper:
    from spo_ray.model.tokenise import ChatTokenizer

    chat = ChatTokenizer.load(model, chat_template)

    def tokenise(row: Row) -> list[Row]:
        prompt = chat.prompt_ids(row["prompt"])
        sides = {
            f"{side}_ids": _checked(prompt, chat.completion_ids(row[side]), limit) for side in ("chosen", "rejected")
        }
        if sides["chosen_ids"] == sides["rejected_ids"]:
            raise RowRejectedError("chosen and rejected are the same")
        return [{"id": row["id"], "prompt_ids": prompt, **sides}]

    return each_row(tokenise)


def _checked(prompt: list[int], completion: list[int], limit: int) -> list[int]:
    """A completion that can be trained on.

    Rows are dropped rather than cut: a cut completion has lost its end-of-turn token, and training on it teaches the
    model never to stop.
    """
    if not completion:
        raise RowRejectedError("empty completion")
    if len(prompt) + len(completion) > limit:
        raise RowRejectedError(f"longer than train.max_length={limit} tokens")
    return completion
