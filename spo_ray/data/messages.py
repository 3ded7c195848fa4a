"""Reads chat messages as OpenAI and ShareGPT write them, and transcripts with ``Human:`` and ``Assistant:``."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spo_ray.errors import RowRejectedError
from spo_ray.runtime import schema

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"},
}
"""Roles by the names that they have in data."""
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


def turn(message: Any, name: str) -> schema.Turn:
    """Return one message of a column, with the further fields that templates read as JSON in ``extra``."""
    role = message.get("role") or message.get("from") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in ROLES:
        raise RowRejectedError(f"{name!r} has a message without a role of {', '.join(ROLES)}")
    refuse_media(message)
    extra = {key: _plain(message[key]) for key in EXTRA if message.get(key)}
    if isinstance(extra.get("tool_calls"), list):
        extra["tool_calls"] = [_call(call) for call in extra["tool_calls"]]
    content = _joined(message.get("content", message.get("value")), name)
    if content is None and "tool_calls" in extra:
        content = ""
    may_be_empty = role == "system" or "tool_calls" in extra or ROLES[role] == "tool"
    found: schema.Turn = {"role": ROLES[role], "content": text(content, f"{name}.content", may_be_empty)}
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
    """Return the content of a message; a list of text parts as one text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowRejectedError(f"{name!r} has content of type {kind!r}: only text is trained on")
    return "".join(part["text"] for part in content)


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
