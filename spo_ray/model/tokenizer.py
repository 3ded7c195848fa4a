"""Tokenisation of chat prompts and completions.

A prompt is templated and tokenised; a completion is tokenised separately and ends with exactly one end-of-turn token.
Therefore no token spans the boundary, and prompt tokens are the same in sampling, training and evaluation.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from spo_ray.errors import RowRejectedError, UserError, first_line
from spo_ray.model import render_template

if TYPE_CHECKING:  # a type alone: benchmarks.gpu does without pydantic
    from spo_ray.config.model import TemplateConfig

Message = Mapping[str, Any]
"""``role``, ``content``, and ``extra`` as in :class:`spo_ray.runtime.schema.Turn`."""
_PROBE = "completion-boundary"
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
"""Arguments of templates that are no settings."""
NO_LIMIT, LONGEST_TOKEN = sys.maxsize, 256
"""Most characters of a token; vocabularies have runs of 128 spaces."""
REASONING = ("reasoning_content", "thinking")
"""Fields of a message with an assistant's reasoning."""


class Opening(NamedTuple):
    """What a template writes before an answer; it differs if templated prompts and conversations do not agree."""

    prompt: str
    """End of a templated prompt that is missing before the answer in a conversation; empty if they agree."""
    conversation: str
    """Text before the answer in a conversation that is missing at the end of a prompt; empty if they agree."""


CHECKED = "SPO_CHECKED_TEMPLATES"
"""Environment variable with digests of the templates that were rendered within limits; child processes inherit it."""
TEMPLATE_REFUSES = "the chat template refuses the messages"
"""Reason why a row is not used; the template's own message follows."""
START_S = 120
"""Seconds that a process may take to start and render a template on a busy machine."""


class ChatTokenizer:
    """Wrapper of a Hugging Face tokenizer with the operations that training and sampling need.

    Args:
        tokenizer: the tokenizer.
        template: replacement, arguments and answer prefix of its chat template.
        rows: number of token ids that the model knows; None: any.

    Raises:
        UserError: the tokenizer has no chat template, the template can't be used or does not take the arguments, no
            end-of-turn token can be found, or the model does not know a token other than the padding, for which any
            other will do because it is masked.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: "TemplateConfig | None" = None, rows: int | None = None
    ) -> None:
        name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise UserError(f"{name} has no chat template: use an instruction-tuned model, or set model.chat_template")
        if not tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:  # transformers makes an empty one then
            raise UserError(f"{name} has no vocabulary: tokenizer.json is missing, or can't be read")
        check_template(tokenizer)
        self.tokenizer, self.answer_prefix = tokenizer, template.answer_prefix if template else None
        settings = template.template_arguments if template else {}
        self.arguments: dict[str, Any] = dict(settings)
        if (
            date := template.template_date if template else None
        ):  # replaces the function by which templates ask for today's date
            self.arguments["strftime_now"] = date.strftime
        self.words = set(re.findall(r"\w+", str(tokenizer.get_chat_template())))
        for argument in settings:
            if argument not in self.words or argument in RESERVED:
                raise UserError(f"model.template_arguments: {argument!r} is no setting of {name}'s chat template")
        try:
            self.opening = self._opening(self.arguments)
            end, following = self._special_behind([]), None
            if end is None:
                following = self._special_behind(_messages("question"))
        except RowRejectedError as error:
            raise UserError(f"the chat template of {name} can't be used: {error}") from error
        ends = [token for token in (end, tokenizer.eos_token_id) if token is not None]
        if not ends:
            raise UserError(f"{name}: neither the chat template nor the tokenizer names an end token")
        self.end_id, self.writes_end = int(ends[0]), end is not None
        self.stop_ids = sorted({*ends, *([] if following is None else [following])})
        """Tokens that end a generation: end of turn, end of text, and the next turn's mark where no token ends one."""
        self.rows = sys.maxsize if rows is None else rows
        self._refuse_unknown()
        pad = tokenizer.pad_token_id
        self.pad_id = int(self.end_id if pad is None or pad >= self.rows else pad)

    @classmethod
    def load(
        cls, path: str | Path, template: "TemplateConfig | None" = None, model: str | Path | None = None
    ) -> "ChatTokenizer":
        """Load from a directory or the hub; ``model`` is the model's checkpoint, if it is not in the same place."""
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        if template and template.chat_template:
            tokenizer.chat_template = template.chat_template
        return cls(tokenizer, template, embedding_rows(model or path))

    def prompt_ids(self, prompt: str | Sequence[Message], limit: int = NO_LIMIT) -> list[int]:
        """Return the token ids of a prompt (a user turn or chat messages) up to the start of the answer.

        Raises:
            RowRejectedError: the template refuses it, or it is so long that it must have more than ``limit`` tokens.
        """
        return self._encode(self.prompt_text(_messages(prompt)), limit)

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """Return a prompt (messages without ``extra``) as the template writes it, with ``model.answer_prefix``."""
        return self._render(messages, self.arguments, True) + (self.answer_prefix or "")

    def completion_ids(self, text: str, limit: int = NO_LIMIT) -> list[int]:
        """Return the token ids of a completion with one end-of-turn token at its end; empty for blank text."""
        if not text.strip():
            return []
        ids = self._encode(text, limit)
        return ids if not ids or ids[-1] == self.end_id else [*ids, self.end_id]

    def answer_ids(
        self, prompt: str | Sequence[Message], text: str, extra: str | None = None, limit: int = NO_LIMIT
    ) -> list[int]:
        """Return the token ids of an answer to a prompt with one end-of-turn token; empty for a blank answer.

        An answer with tool calls or reasoning (in ``extra``) is written by the template, any other is as it stands.

        Raises:
            RowRejectedError: the template refuses it, or does not write it behind the prompt, or it is so long that it
                must have more than ``limit`` tokens.
        """
        if not extra:
            return self.completion_ids(text, limit)
        before, whole = self.prompt_text(_messages(prompt)), self._conversation(prompt, text, extra)
        end = whole.rfind(str(self.tokenizer.decode([self.end_id])))
        if not whole.startswith(before) or end < len(before):
            raise RowRejectedError(f"the chat template writes no answer with {', '.join(json.loads(extra))}")
        return self.completion_ids(whole[len(before) : end], limit)

    def is_changed_by_template(self, prompt: str | Sequence[Message], text: str) -> bool:
        """Return True if the template writes the answer in a conversation with other tokens than it has by itself.

        Then the template trims or rewrites answers, or a token spans their start, and a model that was trained with it
        has seen answers in another form. What stands before all answers is not compared (see :attr:`opening`), nor the
        end-of-turn token if the template writes none.

        Raises:
            RowRejectedError: the template refuses the conversation.
        """
        start, whole = self.prompt_text(_messages(prompt)), self._encode(self._conversation(prompt, text))
        bare = start.removesuffix(self.answer_prefix or "").removesuffix(self.opening.prompt)
        answer = self.completion_ids(text)[: None if self.writes_end else -1]
        parts = [self._encode(before) + answer for before in {start, bare + self.opening.conversation}]
        return all(whole[: len(ids)] != ids for ids in parts)

    def check_opening(self) -> None:
        """Raise a UserError if there is :meth:`advice` on what to set."""
        if advice := self.advice():
            raise UserError(advice)

    def advice(self) -> str:
        """Return what to set so that prompts end as the template begins answers; empty if they do.

        It is empty too if ``model.answer_prefix`` is set: then that is what shall stand there.
        """
        if not any(self.opening) or self.answer_prefix is not None:
            return ""
        prompt, conversation = self.opening
        differ = f"the chat template ends prompts in {prompt!r} and " if prompt else "the chat template "
        differ += f"writes {conversation!r} between a prompt and its answer" if conversation else "leaves that out"
        otherwise = "or model.answer_prefix to '' if your answers bring it along"
        found = re.findall(r"(\w+) is (?:not )?defined", str(self.tokenizer.get_chat_template()))
        for name in dict.fromkeys(found):
            for value in (False, True):
                if self._agrees_with(name, value):
                    setting = f"{{{name}: {str(value).lower()}}}"
                    return f"{differ}: set model.template_arguments to {setting}, {otherwise}"
        text = f"to {conversation!r}" if conversation else "to the text that ends it"
        return f"{differ}: set model.answer_prefix {text}, {otherwise}"

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

    def _encode(self, text: str, limit: int = NO_LIMIT) -> list[int]:
        if len(text) > limit * LONGEST_TOKEN:  # tokenising many megabytes can take minutes and gigabytes
            raise RowRejectedError(f"longer than {limit} tokens")
        # verbose=False: no warnings about long texts, which are dropped later
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _conversation(self, prompt: str | Sequence[Message], text: str, extra: str | None = None) -> str:
        answer = {"role": "assistant", "content": text, "extra": extra}
        return self._render([*_messages(prompt), *_messages([answer])], self.arguments, False)

    def _refuse_unknown(self) -> None:
        """Refuse tokens without a row in the model's embedding, if ordinary texts or the chat template have them.

        A special token that no template uses, such as one that transformers adds by itself, does no harm.
        """
        tokenizer: Any = self.tokenizer
        ids = {i: word for word, i in tokenizer.get_vocab().items() if i >= self.rows and i != tokenizer.pad_token_id}
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        used = self._encode(self._conversation("question", _PROBE)) if ids else []
        unknown = {i for i in ids if i not in special or i in used}
        if unknown:
            raise UserError(
                f"the tokenizer has ids up to {max(unknown)}, but the model's embedding has {self.rows} rows: "
                f"{ids[min(unknown)]!r} is {min(unknown)}; resize the embedding, or use the model's own tokenizer"
            )

    def _render(self, messages: Sequence[Message], arguments: Mapping[str, Any], generation: bool) -> str:
        """Return messages as the template writes them, with their tools.

        Raises:
            RowRejectedError: the template refuses them, or writes nothing of a tool, a call or reasoning.
        """
        plain = [dict(message) for message in messages]
        tools = plain[0].pop("tools", None) if plain else None
        options: Any = {"tools": tools, "add_generation_prompt": generation, "tokenize": False, **arguments}
        try:
            text = str(self.tokenizer.apply_chat_template(plain, **options))
        except Exception as error:  # a template's own exception, or any that its mistakes cause
            raise RowRejectedError(f"{TEMPLATE_REFUSES}: {first_line(error)}") from error
        calls = [call for message in plain for call in message.get("tool_calls") or []]
        names = [call["function"]["name"] for call in [*(tools or []), *calls]]
        lost = [f"tool {name!r}" for name in names if name not in text]
        lost += [repr(key) for message in plain for key in REASONING if key in message and key not in self.words]
        if lost:
            raise RowRejectedError(f"the chat template leaves out the {lost[0]}")
        return text

    def _agrees_with(self, name: str, value: bool) -> bool:
        """Return True if prompts end as answers begin once the template is given this argument."""
        try:
            return not any(self._opening(self.arguments | {name: value}))
        except RowRejectedError:  # an argument of another type
            return False

    def _opening(self, arguments: Mapping[str, Any]) -> Opening:
        """Return how the end of a prompt differs from what stands before its answer."""
        turns = _messages("question")
        prompt = self._render(turns, arguments, True)
        answer = {"role": "assistant", "content": _PROBE}
        before = self._render([*turns, answer], arguments, False).rpartition(_PROBE)[0]
        shared = len(os.path.commonprefix([prompt, before]))  # noqa: RUF071 (characters are meant, no path's parts)
        return Opening(prompt[shared:], before[shared:])

    def _special_behind(self, others: Sequence[Message]) -> int | None:
        """Return the first special token that the template writes behind an answer that ``others`` follow, if any."""
        tokenizer: Any = self.tokenizer
        text = self._render(
            [*_messages("question"), {"role": "assistant", "content": _PROBE}, *others], self.arguments, False
        )
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        return next((token for token in self._encode(text.rpartition(_PROBE)[2]) if token in special), None)


def tokenise_row(chat: ChatTokenizer, row: Mapping[str, Any], sides: Mapping[str, str], limit: int) -> dict[str, Any]:
    """Return a prompt and its completions as token ids; ``sides`` maps columns of text to columns of token ids.

    A prompt with one completion has at most ``limit`` tokens. Longer rows are dropped, not cut: a cut completion has no
    end-of-turn token, and a model trained on it learns not to stop.

    Raises:
        RowRejectedError: a completion is empty, too long or like the other one, a text contains special tokens, or the
            chat template refuses the conversation.
    """
    prompt = chat.prompt_ids(row["prompt"], limit)
    found: dict[str, Any] = {"id": row["id"], "prompt_ids": prompt, "template_differs": False}
    turns = [row["prompt"]] if isinstance(row["prompt"], str) else [turn["content"] for turn in row["prompt"]]
    if any(chat.has_markup(text + " ") for text in turns):
        raise RowRejectedError("special tokens within the prompt")
    for side, column in sides.items():
        extra = row.get(f"{side}_extra")
        found[column] = chat.answer_ids(row["prompt"], row[side], extra, limit)
        if not found[column]:
            raise RowRejectedError("empty completion")
        if len(prompt) + len(found[column]) > limit:
            raise RowRejectedError(f"longer than max_length={limit} tokens")
        if chat.has_markup(row[side]):
            raise RowRejectedError("special tokens within a completion")
        found["template_differs"] |= not extra and chat.is_changed_by_template(row["prompt"], row[side])
    if "chosen_ids" in found and found["chosen_ids"] == found["rejected_ids"]:
        raise RowRejectedError("chosen and rejected are the same")
    return found | {"score_gap": row.get("score_gap")}


def embedding_rows(path: str | Path) -> int | None:
    """Return the number of token ids that a checkpoint's model knows; None if no configuration says so."""
    try:
        return getattr(AutoConfig.from_pretrained(path).get_text_config(), "vocab_size", None)
    except (OSError, ValueError):
        return None


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


def _messages(prompt: str | Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as templates take them."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [
        {key: value for key, value in message.items() if key != "extra"} | json.loads(message.get("extra") or "{}")
        for message in prompt
    ]
