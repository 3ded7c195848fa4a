"""Reads chat messages as OpenAI and ShareGPT write them, and transcripts with ``Human:`` and ``Assistant:``."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spo_ray.errors import RowRejectedError
from spo_ray.runtime import schema

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "model": "assistant"},
    **{"observation": "tool", "tool_response": "tool", "function": "tool"},
}
"""Roles by the names that they have in data."""
CALLS = ("function_call", "tool_call")
"""Roles of messages whose text is an assistant's call of a tool, as JSON."""
EXTRA = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
"""Fields of a message, besides role and content, that chat templates read."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Fields of rows and messages that carry meaning which a text model can't be trained on."""


def messages(value: Any, name: str) -> list[schema.Turn]:
    """Return the messages of a column: a user's text, a transcript, one message or many.

    Empty system messages are left out.

    Raises:
        RowRejectedError: it is none of these; the message names the column.
    """
    if isinstance(value, str):
        return transcript(value, name) or [{"role": "user", "content": text(value, name)}]
    if isinstance(value, Mapping):
        inner = value.get("messages", value.get("conversations"))
        value = [value] if inner is None else inner
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowRejectedError(f"{name!r} is no text, and no list of messages")
    turns = [turn(message, name) for message in value]
    return [found for found in turns if found["role"] != "system" or found["content"].strip()]


def example(row: Mapping[str, Any]) -> tuple[list[schema.Turn], schema.Turn]:
    """Return prompt and answer of an SFT row: ``prompt`` and ``completion``, as text or messages, or ``messages``.

    Of a conversation the last message is the answer; those before it are the prompt. ``conversations`` is read as
    ``messages`` is.

    Raises:
        RowRejectedError: the row has neither format, or can't be used; the message says what is wrong.
    """
    refuse_media(row)
    whole = [name for name in ("messages", "conversations") if row.get(name) is not None]
    name = whole[0] if whole else "completion"
    before = [] if whole else messages(row.get("prompt"), "prompt")
    if before and isinstance(row.get(name), str):
        last: schema.Turn = {"role": "assistant", "content": text(row[name], name)}
    else:
        *before, last = [*before, *messages(row.get(name), name)]
    if last["role"] != "assistant":
        raise RowRejectedError(f"{name!r} does not end in an assistant's message")
    if not before:
        raise RowRejectedError("no 'prompt'")
    return with_columns(before, row.get("system"), row.get("tools")), last


def with_columns(turns: list[schema.Turn], system: Any, tools_of_row: Any) -> list[schema.Turn]:
    """Return messages with what a row has beside them: the system's text as the first one, tools in its ``extra``."""
    if system is not None and not (isinstance(system, str) and not system.strip()):
        first: schema.Turn = {"role": "system", "content": text(system, "system")}
        if turns[0]["role"] not in ("system", "developer"):
            turns = [first, *turns]
        elif turns[0]["content"].strip() != first["content"].strip():
            raise RowRejectedError("'system' differs from the system message in 'prompt'")
    found = tools(tools_of_row)
    if not found:
        return turns
    extra = json.loads(turns[0].get("extra") or "{}") | {"tools": found}
    return [{**turns[0], "extra": json.dumps(extra, ensure_ascii=False)}, *turns[1:]]


def turn(message: Any, name: str) -> schema.Turn:
    """Return one message of a column, with the further fields that templates read as JSON in ``extra``."""
    said = message.get("role") or message.get("from") if isinstance(message, Mapping) else None
    if not isinstance(said, str):
        raise RowRejectedError(f"{name!r} has a message without a 'role'")
    role = "assistant" if said.lower() in CALLS else ROLES.get(said.lower())
    if role is None:
        raise RowRejectedError(f"{name!r} has a message of the role {said!r}; known: {', '.join([*ROLES, *CALLS])}")
    refuse_media(message)
    said_text = [message[key] for key in ("content", "value") if message.get(key) is not None]  # Arrow adds nulls
    content = _joined(said_text[0] if said_text else None, name)
    extra = {key: _plain(message[key]) for key in EXTRA if message.get(key)}
    if message.get("reasoning"):  # as servers name it; templates know it by the other name
        extra.setdefault("reasoning_content", message["reasoning"])
    calls = extra.get("tool_calls", message.get("function_call"))
    if said.lower() in CALLS:
        calls, content = _parsed(content, f"{name!r} has a call that is"), None
    if calls:
        extra["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
        content = content or ""
    may_be_empty = role in ("system", "tool") or "tool_calls" in extra
    found: schema.Turn = {"role": role, "content": text(content, f"{name}.content", may_be_empty)}
    return found | {"extra": json.dumps(extra, ensure_ascii=False)} if extra else found


def tools(value: Any) -> list[Any]:
    """Return the tools of a row, which may be JSON text, as templates take them; empty if it has none."""
    value = _parsed(value, "'tools' is")
    if not value:
        return []
    found = [_plain(_parsed(tool, "'tools' is")) for tool in value] if isinstance(value, list) else [None]
    return [_function(tool, "'tools'") for tool in found]


def transcript(value: str, name: str) -> list[schema.Turn] | None:
    """Return the turns of a text that consists of ``Human:`` and ``Assistant:`` turns, or None for any other text.

    An empty turn of the assistant at the end, to be answered, is left out.
    """
    gap = r"\n\n+" if "\n\nAssistant:" in value else r"\n+"
    before, *parts = re.split(rf"(?:\A\s*|{gap})(Human|Assistant):", value)
    if before.strip() or "Assistant" not in parts[::2]:
        return None
    if not parts[-1].strip() and parts[-2] == "Assistant":
        parts = parts[:-2]
    roles = {"Human": "user", "Assistant": "assistant"}
    contents = [text(part.strip(), f"{name}: a turn") for part in parts[1::2]]
    return [{"role": roles[who], "content": said} for who, said in zip(parts[::2], contents, strict=True)]


def refuse_media(fields: Mapping[str, Any]) -> None:
    """Raise a RowRejectedError if a row or message has images, videos or sound."""
    for name in MEDIA:
        if fields.get(name):
            raise RowRejectedError(f"{name!r} can't be used: only text is trained on")


def text(value: Any, name: str, may_be_empty: bool = False) -> str:
    """Return a value that can be used as text; raise a RowRejectedError for any other."""
    reason = text_defect(value, name, may_be_empty=may_be_empty)
    if reason:
        raise RowRejectedError(reason)
    return value


def text_defect(value: Any, name: str, *, may_be_empty: bool = False) -> str | None:
    """Return the reason why a value can't be used as text; None if it can."""
    if not isinstance(value, str):
        return f"{name!r} is no text"
    if not value.strip() and not may_be_empty:
        return f"{name!r} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{name!r} is not valid Unicode"
    return None


def _joined(content: Any, name: str) -> Any:
    """Return the content of a message; a list of texts, or of OpenAI's parts with texts, as one text."""
    if not isinstance(content, list):
        return content
    parts = [{"text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise RowRejectedError(f"{name!r} has content of type {kind!r}: only text is trained on")
    return "".join(part["text"] for part in parts)


def _plain(value: Any) -> Any:
    """Return a value without the null fields that Arrow adds where other rows have more fields."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _call(call: Any) -> Any:
    """Return a tool call whose arguments are a mapping, which templates expect; OpenAI's are JSON text, or missing."""
    found = _function(call, "'tool_calls'")
    arguments = _parsed(found["function"].get("arguments"), "'tool_calls' has 'arguments' that are")
    return {**found, "function": {**found["function"], "arguments": {} if arguments is None else arguments}}


def _function(value: Any, name: str) -> Any:
    """Return a tool or a call of one with its function below ``function``, where templates look for it."""
    found = value if isinstance(value, Mapping) and "function" in value else {"type": "function", "function": value}
    if not isinstance(found["function"], Mapping) or not isinstance(found["function"].get("name"), str):
        raise RowRejectedError(f"{name} has a function without a 'name'")
    return found


def _parsed(value: Any, what: str) -> Any:
    """Return the value of JSON text; other values are returned as they are, blank text as null."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise RowRejectedError(f"{what} not JSON") from error
