"""A chat with one checkpoint, or with several side by side, in the terminal; answers appear as they are written."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import GenerationConfig, TextStreamer

from spo_ray.config.model import TemplateConfig
from spo_ray.errors import RowRejectedError, UserError
from spo_ray.model.generate import generate
from spo_ray.model.load import load_model
from spo_ray.model.tokenizer import ChatTokenizer
from spo_ray.runtime.console import visible


class Speaker:
    """A checkpoint with its own side of a conversation."""

    def __init__(self, path: str, template: TemplateConfig, dtype: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.chat = ChatTokenizer.load(path, template)
        self.model = load_model(path, dtype).to(self.device).eval()
        self.messages: list[dict[str, str]] = []

    def answer(self, question: str, settings: Mapping[str, Any], on_text: Callable[[str], None]) -> None:
        """Answer a user's message; ``on_text`` receives the answer piece by piece.

        Raises:
            UserError: the chat template refuses the conversation.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            ids = self.chat.prompt_ids(self.messages)
        except RowRejectedError as error:
            raise UserError(str(error)) from error
        own = GenerationConfig(eos_token_id=self.chat.stop_ids, pad_token_id=self.chat.pad_id, **settings)
        stream = _Stream(self.chat.tokenizer, on_text)
        (found,) = generate(self.model, self.chat, [ids], self.device, generation_config=own, streamer=stream)
        self.messages.append({"role": "assistant", "content": self.chat.decode(found)})


class _Stream(TextStreamer):
    """Hands text on as soon as no later token can change it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def converse(
    speakers: Mapping[str, Speaker], questions: Iterable[str], temperature: float, max_tokens: int, console: Console
) -> None:
    """Put each question to all speakers, whose answers stand side by side; ``/new`` starts a new conversation."""
    settings: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": temperature > 0}
    settings |= {"temperature": temperature, "top_k": 0} if temperature else {}
    for question in questions:
        if question == "/new":
            for speaker in speakers.values():
                speaker.messages.clear()
            continue
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            shown = partial(_show_more, live, dict.fromkeys(speakers, ""))
            for name, speaker in speakers.items():
                speaker.answer(question, settings, partial(shown, name))
        if not console.is_terminal:
            console.line()  # Live ends the last line only in a terminal


def _show_more(live: Live, answers: dict[str, str], name: str, text: str) -> None:
    answers[name] += visible(text)
    live.update(_side_by_side(answers), refresh=live.console.is_terminal)


def _side_by_side(answers: Mapping[str, str]) -> Table:
    table = Table(*answers, box=None, expand=True, header_style="bold", padding=(0, 1))
    for column in table.columns:
        column.ratio = 1
    table.add_row(*answers.values())
    return table
