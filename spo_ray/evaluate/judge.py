"""Judges: chat models that choose the better of two outputs, at an endpoint or in an engine of this project."""

import asyncio
import hashlib
import json
import math
import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from spo_ray.config.base import first_problem
from spo_ray.config.evaluate import AnnotatorConfig
from spo_ray.errors import UserError
from spo_ray.model.completion import HIGHEST_LOGP, Generations, Skipped, valid_text
from spo_ray.runtime.artifact import Artifact, set_aside

FIELDS = ("instruction", "output_1", "output_2")
TOP_LOGPROBS = 5
MOST_TOKENS = 10**8
"""More tokens than a prompt or an answer can have."""
Turns = list[dict[str, str]]


Logp = Annotated[float, Field(le=HIGHEST_LOGP)]
Tokens = Annotated[int, Field(strict=True, ge=0, le=MOST_TOKENS)]


class Reply(NamedTuple):
    """A judge's answer to one prompt."""

    text: str
    logps: tuple[Logp, Logp] | None
    """Log-probabilities of the two identifiers, -inf where one is not among the likely tokens; None: unknown."""
    tokens: tuple[Tokens, Tokens] = (0, 0)
    """Tokens of the prompt and of the answer."""


REPLY = TypeAdapter(Reply)
"""Reads a reply from the cache's JSON, and refuses what can't be one."""

Keep = Callable[[int, Reply], None]
"""Receives (index of the request, its reply) as soon as the reply is there."""


def read_template(annotator: AnnotatorConfig) -> Turns:
    """Return the prompt's turns with their placeholders.

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
    """Replace a template's placeholders by texts; placeholders within these texts are not replaced."""
    pattern = re.compile("|".join(rf"\{{{name}\}}" for name in fields))
    return [
        turn | {"content": pattern.sub(lambda match: fields[match.group()[1:-1]], turn["content"])} for turn in template
    ]


def read_verdict(reply: Reply, annotator: AnnotatorConfig) -> float | None:
    """Return a judge's preference for the second output between 0 and 1, or None if the reply has no verdict.

    It comes from the identifiers' probabilities, or from the identifier that the last line names.
    """
    if annotator.verdict != "discrete" and reply.logps is not None and max(reply.logps) > -math.inf:
        first, second = reply.logps
        return 1.0 / (1.0 + math.exp(min(700.0, first - second)))
    lines = [line for line in reply.text.splitlines() if line.strip()]
    if annotator.verdict == "weighted" or not lines:
        return None
    # the second lookbehind: "I'm sure M" names M alone
    named = [i for i in annotator.identifiers if re.search(rf"(?<!\w)(?<!\w['’]){re.escape(i)}(?!\w)", lines[-1])]
    return float(annotator.identifiers.index(named[0])) if len(named) == 1 else None


def identity(annotator: AnnotatorConfig, model: Artifact) -> dict[str, Any]:
    """Return the settings that a reply depends on, besides the prompt."""
    own = annotator.model_dump(include={"identifiers", "max_tokens", "temperature"})
    own["weighted"] = _weighted(annotator)
    if annotator.engine.type == "endpoint":
        request = {"request": annotator.engine.request} if annotator.engine.request else {}
        return own | request | {"url": annotator.engine.url, "model": annotator.model}
    engine = annotator.engine.model_dump(include={"type", "dtype", "max_model_len", "arguments"})
    return own | {"engine": engine, "model": model.digest}


def _weighted(annotator: AnnotatorConfig) -> bool:
    """Return True if log-probabilities are asked for."""
    return annotator.verdict != "discrete" and annotator.max_tokens == 1


def ask_endpoint(annotator: AnnotatorConfig, requests: Sequence[Turns], keep: Keep) -> dict[int, str]:
    """Send requests to a server; return the reasons of those without a reply by their index.

    Raises:
        UserError: the server rejects the key, or does not know the model.
    """
    try:
        return asyncio.run(_ask_all(annotator, requests, keep))
    except ExceptionGroup as errors:  # the first one has ended the others
        raise errors.exceptions[0] from None


async def _ask_all(annotator: AnnotatorConfig, requests: Sequence[Turns], keep: Keep) -> dict[int, str]:
    import openai  # takes a second, and every command imports this file

    from spo_ray.model.endpoint import LOCKED_OUT, ChatClient

    config: Any = annotator.engine
    failed: dict[int, str] = {}
    logprobs = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if _weighted(annotator) else {}
    settings = {"model": annotator.model, "max_tokens": annotator.max_tokens, "temperature": annotator.temperature}

    async def one(index: int, turns: Turns) -> None:
        try:
            reply = _reply(await client.ask(logprobs, messages=turns, **settings), annotator)
        except LOCKED_OUT as error:
            raise UserError(
                f"annotator {annotator.name}: {config.url} answers {error.status_code}: {_short(error)}; check the "
                f"model's name and the key in {config.api_key_env}"
            ) from error
        except openai.OpenAIError as error:
            failed[index] = f"{type(error).__name__}: {_short(error)}"
        else:
            keep(index, reply)

    key = os.environ.get(config.api_key_env)
    async with ChatClient(config, key, annotator.requests_per_minute) as client, asyncio.TaskGroup() as group:
        for index, turns in enumerate(requests):
            group.create_task(one(index, turns))
    return failed


def _short(error: Exception) -> str:
    return valid_text((str(error).splitlines() or [""])[0][:200])


def _reply(response: Any, annotator: AnnotatorConfig) -> Reply:
    """Read a response, which the openai client does not validate.

    Raises:
        InvalidResponseError: the response lacks a field, or one has a wrong type or an impossible value.
    """
    from spo_ray.model.endpoint import InvalidResponseError, logprob_of

    try:
        choice, usage = response.choices[0], response.usage
        content = choice.logprobs.content if choice.logprobs else None
        top = {token.token: logprob_of(token) for token in (content[0].top_logprobs or [])} if content else {}
        first, second = (top.get(name, -math.inf) for name in annotator.identifiers)
        tokens = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
        reply = Reply(valid_text(choice.message.content), (first, second) if top else None, tokens)
        return REPLY.validate_json(json.dumps(reply))  # as it will be read from the cache
    except ValidationError as error:
        raise InvalidResponseError(f"a response with an impossible value ({first_problem(error)})") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InvalidResponseError(f"a response of an unexpected form ({error})") from error


def local_replies(local: Any, requests: Sequence[Turns], annotator: AnnotatorConfig) -> list[Reply | Skipped]:
    """Return the replies of a model in this process (:class:`spo_ray.model.engines.LocalAnswers`)."""
    if not _weighted(annotator):
        asked = [(turns, 0) for turns in requests]
        found = local(asked, n=1, temperature=annotator.temperature, max_tokens=annotator.max_tokens)
        return [answers if isinstance(answers, Skipped) else _written(answers) for answers in found]
    names = [local.chat.tokenizer(name, add_special_tokens=False)["input_ids"] for name in annotator.identifiers]
    longest = max(map(len, names))
    prompts = [local.prompt_ids(turns, longest) for turns in requests]
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


def _written(answers: Generations) -> Reply:
    (completion,) = answers.completions
    return Reply(completion.text, None, (len(answers.prompt_ids), completion.tokens))


class Cache:
    """Replies of judges by content, kept in a file as soon as they arrive, so that none is paid for twice.

    Several threads may use it. A file that is no such cache, or is damaged, is moved aside.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and not _is_cache(path):
            set_aside(path, "is no cache of judgements, or is damaged")
            for name in ("-journal", "-wal", "-shm"):  # SQLite would apply them to the new file
                path.with_name(path.name + name).unlink(missing_ok=True)
        path.touch(mode=0o600)  # prompts and replies are for nobody else
        self.database = _connected(path)
        self.database.execute("CREATE TABLE IF NOT EXISTS said (key TEXT PRIMARY KEY, value TEXT NOT NULL)")

    @staticmethod
    def key(**content: Any) -> str:
        """Return a digest of everything that a reply depends on."""
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Reply | None:
        """Return the reply; None if there is none, or what is there is no reply."""
        found = self.database.execute("SELECT value FROM said WHERE key = ?", (key,)).fetchone()
        with suppress(ValidationError):
            return None if found is None else REPLY.validate_json(found[0])
        return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        self.database.execute("INSERT OR REPLACE INTO said VALUES (?, ?)", (key, json.dumps(reply)))

    def close(self) -> None:
        """Close the file."""
        self.database.close()


def _connected(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=60.0, check_same_thread=False, isolation_level=None)


BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
"""Codes of SQLite for files that are damaged, no database, or a database with other columns."""


def _is_cache(path: Path) -> bool:
    """Return True if a file is an intact cache, or empty; other errors, such as a locked file, are raised."""
    if not path.is_file():
        return False
    try:
        with closing(_connected(path)) as database:
            if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return True
            database.execute("SELECT key, value FROM said LIMIT 1").fetchall()
            return database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in BROKEN:  # the low byte is the kind
            raise
        return False
