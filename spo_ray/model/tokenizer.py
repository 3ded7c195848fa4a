"""Tokenisation of chat prompts and completions.

A prompt is templated and tokenised; a completion is tokenised separately and ends with exactly one end-of-turn token.
Therefore no token spans the boundary, and prompt tokens are the same in sampling, training and evaluation.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spo_ray.errors import UserError
from spo_ray.model.checkpoint_config import embedding_rows

Message = dict[str, str]
_PROBE = "completion-boundary"


class ChatTokenizer:
    """Wrapper of a Hugging Face tokenizer with the operations that training and sampling need.

    Args:
        tokenizer: the tokenizer.
        rows: number of token ids that the model knows; None: any.

    Raises:
        UserError: the tokenizer has no chat template, no end-of-turn token can be found, or the model does not know a
            token other than the padding, for which any other will do because it is masked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> None:
        if not tokenizer.chat_template:
            name = tokenizer.name_or_path or "the tokenizer"
            raise UserError(f"{name} has no chat template: use an instruction-tuned model, or set model.chat_template")
        self.tokenizer = tokenizer
        self.end_id = _end_of_turn(tokenizer)
        self.rows = sys.maxsize if rows is None else rows
        _refuse_unknown(tokenizer, self.rows)
        pad = tokenizer.pad_token_id
        self.pad_id = int(self.end_id if pad is None or pad >= self.rows else pad)

    @classmethod
    def load(
        cls, path: str | Path, chat_template: str | None = None, model: str | Path | None = None
    ) -> "ChatTokenizer":
        """Load from a directory or the hub; ``chat_template`` (Jinja text) replaces the tokenizer's own.

        ``model`` is the checkpoint of the model, if it is not in the same place.
        """
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        if chat_template:
            tokenizer.chat_template = chat_template
        return cls(tokenizer, embedding_rows(model or path))

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end a generation: end of turn, and end of text if it differs."""
        eos = self.tokenizer.eos_token_id
        return sorted({self.end_id} | ({int(eos)} if eos is not None else set()))

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the token ids of a prompt (a user turn or chat messages) up to the start of the answer."""
        text = self.tokenizer.apply_chat_template(_messages(prompt), add_generation_prompt=True, tokenize=False)
        return self._encode(str(text))

    def completion_ids(self, text: str) -> list[int]:
        """Return the token ids of a completion with one end-of-turn token at its end; empty for blank text."""
        if not text.strip():
            return []
        ids = self._encode(text)
        return ids if ids[-1] == self.end_id else [*ids, self.end_id]

    def is_changed_by_template(self, prompt: str | Sequence[Message], text: str) -> bool:
        """Return True if the templated conversation does not start with the tokens of prompt and completion.

        Then the template trims or rewrites answers, or a token spans their start, and a model that was trained with it
        has seen answers in another form.
        """
        turns = [*_messages(prompt), {"role": "assistant", "content": text}]
        whole = self._encode(str(self.tokenizer.apply_chat_template(turns, tokenize=False)))
        parts = self.prompt_ids(prompt) + self.completion_ids(text)
        return whole[: len(parts)] != parts

    def has_markup(self, text: str) -> bool:
        """Return True if text contains special tokens, such as the end of a turn, before its last token.

        Also if it has a token anywhere that the model does not know.
        """
        special = set(self.tokenizer.all_special_ids) | {self.end_id}
        ids = self._encode(text)
        return any(token in special for token in ids[:-1]) or any(token >= self.rows for token in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode(self, text: str) -> list[int]:
        # verbose=False: no warnings about long texts, which are dropped later
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _refuse_unknown(tokenizer: Any, rows: int) -> None:
    """Refuse tokens without a row in the model's embedding, if ordinary texts or the chat template have them.

    A special token that no template uses, such as one that transformers adds by itself, does no harm.
    """
    ids = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows and i != tokenizer.pad_token_id}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = {i for i in ids if i not in special} | (set(_turn_ids(tokenizer)) & ids.keys())
    if unknown:
        raise UserError(
            f"the tokenizer has ids up to {max(unknown)}, but the model's embedding has {rows} rows: "
            f"{ids[min(unknown)]!r} is {min(unknown)}; resize the embedding, or use the model's own tokenizer"
        )


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]


def _end_of_turn(tokenizer: Any) -> int:
    """Return the first special token after an assistant's answer in the template, else the end-of-text token."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for token in _turn_ids(tokenizer, after=True):
        if token in special:
            return int(token)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer names an end token")
    return int(tokenizer.eos_token_id)


def _turn_ids(tokenizer: Any, after: bool = False) -> list[int]:
    """Return the token ids of a templated turn of user and assistant, or of what stands after the answer."""
    turn = [*_messages("question"), {"role": "assistant", "content": _PROBE}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False))
    return list(tokenizer(text.rpartition(_PROBE)[2] if after else text, add_special_tokens=False)["input_ids"])
