"""Write ``docs/configuration.md`` from the schema; with ``--check`` only say whether it is current."""

import datetime
import json
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from spo_ray.config.base import ConfigModel
from spo_ray.config.schema import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Every field of the configuration

One YAML file holds a run; `key.sub=value` on the command line overrides any field. What is left out has the default
below, and an unknown key is an error. `spo-ray plan --full --config FILE` prints the resolved
file. This page is made from the schema by `make docs`.
"""
SIGNS = {Gt: "above", Ge: "at least", Lt: "below", Le: "at most"}
PLAIN = {
    Any: "any value",
    int: "integer",
    float: "number",
    str: "text",
    bool: "true, false",
    Path: "path",
    NoneType: "null",
}
PLAIN |= {datetime.date: "date"}


def page() -> str:
    """The whole document."""
    return "\n".join([HEAD, *_section(Config, "", set())]).rstrip() + "\n"


def _section(kind: type[ConfigModel], path: str, seen: set[type[ConfigModel]]) -> Iterator[str]:
    """A table of a section's fields, and after it the sections that its fields hold."""
    seen.add(kind)
    heading = f"`{path}`" if path else "The file"
    tag = _tag(kind)
    yield f"## {heading}{f', type `{tag}`' if tag else ''}\n"
    yield f"{_sentence(kind.__doc__)}\n"
    if set(kind.model_fields) > ({"type"} if tag else set()):
        yield "| field | values | default | |\n|---|---|---|---|"
    inner: list[tuple[str, type[ConfigModel]]] = []
    for name, field in kind.model_fields.items():
        if name == "type" and tag:
            continue
        found = list(_sections(field.annotation))
        keyed = get_origin(field.annotation) is dict
        inner += [(f"{path}.{name}".lstrip(".") + (".NAME" if keyed else ""), section) for section in found]
        about = field.description or (found[0].__doc__ if len(found) == 1 else None)
        yield f"| `{name}` | {_values(field)} | {_default(field)} | {_sentence(about)} |"
    yield ""
    for where, section in inner:
        if section not in seen:
            yield from _section(section, where, seen)


def _tag(kind: type[ConfigModel]) -> str:
    field = kind.model_fields.get("type")
    values = get_args(field.annotation) if field is not None else ()
    return str(values[0]) if len(values) == 1 else ""


def _sections(annotation: Any) -> Iterator[type[ConfigModel]]:
    if isinstance(annotation, type) and issubclass(annotation, ConfigModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _values(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(limit, kind.__name__.lower()):g}"
        for limit in _limits(field)
        for kind, sign in SIGNS.items()
        if isinstance(limit, kind)
    ]
    limits += [f"at least {limit.min_length} of them" for limit in _limits(field) if isinstance(limit, MinLen)]
    return ", ".join(dict.fromkeys([_type(field.annotation), *limits])).replace("|", "\\|")


def _limits(field: FieldInfo) -> list[Any]:
    """Also those of the types in a union or a list."""
    found, waiting = list(field.metadata), [field.annotation]
    while waiting:
        kind = waiting.pop()
        for item in getattr(kind, "__metadata__", ()):
            found += list(getattr(item, "metadata", [])) or [item]
        waiting += get_args(kind)
    return found


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        kinds = [_type(argument) for argument in arguments]
        return ", ".join(dict.fromkeys(kinds)).replace("section, section", "section")
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(map(_type, arguments))}"
    if origin is dict:
        return f"mapping of names to {_type(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, ConfigModel):
        return f"type `{tag}`" if (tag := _tag(annotation)) else "section"
    return PLAIN[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, ConfigModel):
        given = value.model_dump(mode="json", exclude_unset=True)
        return f"`{json.dumps(given)}`" if given else "its defaults"
    if isinstance(value, Path | Enum):
        value = str(value)
    return f"`{json.dumps(value)}`".replace("|", "\\|")


def _sentence(text: str | None) -> str:
    plain = re.sub(r"\bNone\b", "null", " ".join((text or "").split()).replace(":mod:", ""))
    return plain.replace("``", "`").replace("|", "\\|")


def main() -> int:
    """Write or check; 1 if it is not current."""
    text = page()
    if "--check" in sys.argv:
        current = PAGE.exists() and PAGE.read_text() == text
        print("" if current else f"{PAGE.name} is not current: make docs", end="")
        return int(not current)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
