"""Judges: chat models that say which of two outputs is better, at an endpoint or in an engine of their own."""

import asyncio
import hashlib
import json
import math
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openai

from spo_ray.config.evaluate import AnnotatorConfig
from spo_ray.errors import UserError
from spo_ray.model.completion import Skipped
from spo_ray.model.endpoint import LOCKED_OUT, ChatClient, InvalidResponseError
from spo_ray.runtime.artifact import Artifact

FIELDS = ("instruction", "output_1", "output_2")
TOP_LOGPROBS = 5
Turns = list[dict[str, str]]


class Reply(NamedTuple):
    """What a judge answered to one prompt."""

    text: str
    logps: tuple[float, float] | None
    """Log-probabilities of the two identifiers; None: unknown."""
    tokens: tuple[int, int] = (0, 0)
    """Of prompt and answer."""


class Verdict(NamedTuple):
    """How a judge chose."""

    second: float | None
    """1: the second output is better, 0: the first; None: there is no verdict."""
    text: str


Keep = Callable[[int, Reply], None]
"""Takes in the reply to the request of that number as soon as it is there."""


def read_template(annotator: AnnotatorConfig) -> Turns:
    """The prompt's turns, with their placeholders.

    Raises:
        UserError: the file can't be read, or lacks a placeholder.
    """
    from alpaca_eval import constants, utils

    default = Path(constants.EVALUATORS_CONFIG_DIR) / "alpaca_eval_clf_gpt4_turbo" / "alpaca_eval_clf.txt"
    file = annotator.template or default
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the template of annotator {annotator.name} can't be read: {error}") from error
    missing = [field for field in FIELDS if f"{{{field}}}" not in text]
    if missing:
        raise UserError(f"{file}: the template of annotator {annotator.name} has no {{{missing[0]}}}")
    if not text.startswith("<|im_start|>"):
        return [{"role": "user", "content": text}]
    return [{"role": turn["role"], "content": turn["content"]} for turn in utils.prompt_to_chatml(text)]


def fill(template: Turns, **fields: str) -> Turns:
    """Put texts into a template's places; places inside these texts stay as they are."""
    pattern = re.compile("|".join(rf"\{{{name}\}}" for name in fields))
    return [
        turn | {"content": pattern.sub(lambda match: fields[match.group()[1:-1]], turn["content"])} for turn in template
    ]


def read_reply(reply: Reply, annotator: AnnotatorConfig) -> Verdict:
    """The verdict in a reply: by the identifiers' probabilities, or by the one that the last line names."""
    if annotator.verdict != "discrete" and reply.logps is not None and max(reply.logps) > -math.inf:
        first, second = reply.logps
        return Verdict(1.0 / (1.0 + math.exp(min(700.0, first - second))), reply.text)
    if annotator.verdict == "weighted":
        return Verdict(None, reply.text)
    lines = [line for line in reply.text.splitlines() if line.strip()]
    pattern = r"(?<!\w){}(?!\w)"
    named = [i for i in annotator.identifiers if lines and re.search(pattern.format(re.escape(i)), lines[-1])]
    second = float(annotator.identifiers.index(named[0])) if len(named) == 1 else None
    return Verdict(second, reply.text)


def identity(annotator: AnnotatorConfig, model: Artifact) -> dict[str, Any]:
    """What a reply depends on, besides the prompt."""
    own = annotator.model_dump(include={"identifiers", "max_tokens", "temperature"})
    own["weighted"] = annotator.verdict != "discrete" and annotator.max_tokens == 1
    if annotator.engine.type == "endpoint":
        return own | {"url": annotator.engine.url, "model": annotator.model}
    engine = annotator.engine.model_dump(include={"type", "dtype", "max_model_len", "arguments"})
    return own | {"engine": engine, "model": model.digest}


def ask_endpoint(annotator: AnnotatorConfig, requests: Sequence[Turns], keep: Keep) -> dict[int, str]:
    """Send requests to a server; gives the reasons why some have no reply.

    Raises:
        UserError: the server lets nobody in, or does not know the model.
    """
    try:
        return asyncio.run(_ask_all(annotator, requests, keep))
    except ExceptionGroup as errors:  # the first one has ended the others
        raise errors.exceptions[0] from None


async def _ask_all(annotator: AnnotatorConfig, requests: Sequence[Turns], keep: Keep) -> dict[int, str]:
    config: Any = annotator.engine
    failed: dict[int, str] = {}
    weighted = annotator.verdict != "discrete" and annotator.max_tokens == 1
    logprobs = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if weighted else {}
    settings = {"model": annotator.model, "max_tokens": annotator.max_tokens, "temperature": annotator.temperature}

    async def one(number: int, turns: Turns) -> None:
        try:
            reply = _reply(await client.ask(logprobs, messages=turns, **settings), annotator)
        except LOCKED_OUT as error:
            raise UserError(
                f"annotator {annotator.name}: {config.url} answers {error.status_code}: {_short(error)}; check the "
                f"model's name and the key in {config.api_key_env}"
            ) from error
        except openai.OpenAIError as error:
            failed[number] = f"{type(error).__name__}: {_short(error)}"
        else:
            keep(number, reply)

    key = os.environ.get(config.api_key_env)
    async with ChatClient(config, key, annotator.requests_per_minute) as client, asyncio.TaskGroup() as group:
        for number, turns in enumerate(requests):
            group.create_task(one(number, turns))
    return failed


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _reply(response: Any, annotator: AnnotatorConfig) -> Reply:
    """What matters of a response, which the client has not validated.

    Raises:
        InvalidResponseError: it is no answer.
    """
    try:
        choice, usage = response.choices[0], response.usage
        content = choice.logprobs.content if choice.logprobs else None
        top = {token.token: float(token.logprob) for token in (content[0].top_logprobs or [])} if content else {}
        first, second = (top.get(name, -math.inf) for name in annotator.identifiers)
        tokens = (int(usage.prompt_tokens or 0), int(usage.completion_tokens or 0)) if usage else (0, 0)
        text = choice.message.content or ""
        if not isinstance(text, str):
            raise TypeError("its content is no text")
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InvalidResponseError(f"an answer that is no verdict ({error})") from error
    return Reply(text, (first, second) if top else None, tokens)


def local_replies(local: Any, requests: Sequence[Turns], annotator: AnnotatorConfig) -> list[Reply | Skipped]:
    """Replies of the model of an engine in this process (:class:`spo_ray.model.engines.LocalAnswers`), or reasons."""
    if annotator.verdict == "discrete" or annotator.max_tokens > 1:
        asked = [(turns, 0) for turns in requests]
        found = local(asked, n=1, temperature=annotator.temperature, max_tokens=annotator.max_tokens)
        return [a if isinstance(a, Skipped) else _written(a) for a in found]
    names = [local.chat.tokenizer(name, add_special_tokens=False)["input_ids"] for name in annotator.identifiers]
    answer = max(map(len, names))
    prompts = [local.prompt_ids(turns, answer) for turns in requests]
    able = [ids for ids in prompts if not isinstance(ids, Skipped)]
    scores = iter(local.engine.score([(ids, name) for ids in able for name in names]))
    replies: list[Reply | Skipped] = []
    for ids in prompts:
        if isinstance(ids, Skipped):
            replies.append(ids)
            continue
        logps = (next(scores).logp, next(scores).logp)
        replies.append(Reply(annotator.identifiers[logps[1] > logps[0]], logps, (len(ids), 0)))
    return replies


def _written(answers: Any) -> Reply:
    (completion,) = answers.completions
    return Reply(completion.text, None, (len(answers.prompt_ids), completion.tokens))


class Cache:
    """What judges have said, by content, so that nothing is paid for twice: a file with JSON values, written at once.

    Several threads may use it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(path, timeout=60.0, check_same_thread=False, isolation_level=None)
        self.database.execute("CREATE TABLE IF NOT EXISTS said (key TEXT PRIMARY KEY, value TEXT NOT NULL)")

    @staticmethod
    def key(**content: Any) -> str:
        """A digest of everything that an answer depends on."""
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Any:
        """The value, or None."""
        found = self.database.execute("SELECT value FROM said WHERE key = ?", (key,)).fetchone()
        return None if found is None else json.loads(found[0])

    def put(self, key: str, value: Any) -> None:
        """Keep a value."""
        self.database.execute("INSERT OR REPLACE INTO said VALUES (?, ?)", (key, json.dumps(value)))

    def close(self) -> None:
        """Close the file."""
        self.database.close()
