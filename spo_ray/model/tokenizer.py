"""Tokenisation of chat prompts and completions.

A prompt is templated and tokenised; a completion is tokenised separately and ends with exactly one end-of-turn token.
Therefore no token spans the boundary, and prompt tokens are the same in sampling, training and evaluation.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spo_ray.errors import UserError
from spo_ray.model import render_template

Message = dict[str, str]
_PROBE = "completion-boundary"
CHECKED = "SPO_CHECKED_TEMPLATES"
"""Environment variable with digests of the templates that were rendered within limits; child processes inherit it."""
START_S = 120
"""Seconds that a process may take to start and render a template on a busy machine."""


class ChatTokenizer:
    """Wrapper of a Hugging Face tokenizer with the operations that training and sampling need.

    Raises:
        UserError: the tokenizer has no chat template, or an unusable one, or no end-of-turn token can be found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            name = tokenizer.name_or_path or "the tokenizer"
            raise UserError(f"{name} has no chat template: use an instruction-tuned model, or set model.chat_template")
        check_template(tokenizer)
        self.tokenizer = tokenizer
        self.end_id = _end_of_turn(tokenizer)
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id)

    @classmethod
    def load(cls, path: str | Path, chat_template: str | None = None) -> "ChatTokenizer":
        """Load from a directory or the hub; ``chat_template`` (Jinja text) replaces the tokenizer's own."""
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        if chat_template:
            tokenizer.chat_template = chat_template
        return cls(tokenizer)

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
        """Return True if text contains special tokens, such as the end of a turn, before its last token."""
        special = set(self.tokenizer.all_special_ids) | {self.end_id}
        return any(token in special for token in self._encode(text)[:-1])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode(self, text: str) -> list[int]:
        # verbose=False: no warnings about long texts, which are dropped later
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def check_template(tokenizer: Any) -> None:
    """Render two short chats in a process of its own, with limits of time and memory; once for each template.

    Raises:
        UserError: the template fails, or exceeds a limit.
    """
    turns = [*_messages("question"), {"role": "assistant", "content": _PROBE}]
    asked: dict[str, Any] = {"template": tokenizer.get_chat_template(), "special_tokens": tokenizer.special_tokens_map}
    asked["chats"] = [(turns[:1], True), (turns, False)]
    text = json.dumps(asked, default=str)
    digest, known = hashlib.sha256(text.encode()).hexdigest()[:32], os.environ.get(CHECKED, "")
    if digest in known.split(","):
        return
    command = [sys.executable, "-P", render_template.__file__]
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=START_S)
        why = done.stdout.strip() if done.returncode == 0 else f"it takes more than {render_template.SECONDS} s"
    except subprocess.TimeoutExpired:
        why = f"it was not rendered in {START_S} s"
    if why:
        raise UserError(f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} can't be used: {why}")
    os.environ[CHECKED] = f"{known},{digest}" if known else digest


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]


def _end_of_turn(tokenizer: Any) -> int:
    """Return the first special token after an assistant's answer in the template, else the end-of-text token."""
    turn = [*_messages("question"), {"role": "assistant", "content": _PROBE}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False))
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    after = tokenizer(text.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"]
    for token in after:
        if token in special:
            return int(token)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: neither the chat template nor the tokenizer names an end token")
    return int(tokenizer.eos_token_id)
