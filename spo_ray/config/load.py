"""Reading of a configuration file with command-line overrides; errors name the line and the nearest valid key."""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from spo_ray.config.keys import set_key
from spo_ray.config.schema import Config
from spo_ray.config.sweep import space_problems
from spo_ray.errors import UserError, first_line


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides and validate.

    Raises:
        UserError: the file is missing or no YAML mapping, an override is malformed, or a field is unknown or wrong.
    """
    try:
        with Path(path).open(encoding="utf-8") as stream:  # a device has no end
            tree = _parsed(stream.read(MOST_CHARACTERS + 1), "rt")
    except FileNotFoundError as error:
        raise UserError(f"no configuration file {path}: see configs/ for complete examples") from error
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path} can't be read as YAML: {error}") from error
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path} must hold a mapping of configuration keys")
    for override in overrides:
        _apply(tree, override)
    try:
        config = Config.model_validate(_plain(tree, str(path), count()))
    except ValidationError as error:
        raise UserError(_explain(error, tree, str(path), overrides)) from error
    problems = list(space_problems(config)) if config.sweep else []
    if problems:
        lines = [(f"{path}:{_line(tree, ['sweep', 'space', key])}", key, text) for key, text in problems]
        raise UserError("\n".join(f"{where}: sweep.space.{key}: {text}" for where, key, text in lines))
    return config


_RATES = ["sft.lr", "preference.theta.lr", "preference.phi.lr"]
ELSEWHERE = {
    "lr": _RATES,
    "learning_rate": _RATES,
    "gradient_accumulation": ["train.pairs_per_backward"],
    "gradient_accumulation_steps": ["train.pairs_per_backward"],
    "per_device_train_batch_size": ["train.pairs_per_backward"],
    "num_train_epochs": ["sft.epochs", "preference.epochs"],
    "beta": ["methods.NAME.beta"],
    "bf16": ["train.precision=bfloat16"],
    "model_name_or_path": ["model.path"],
    "output_dir": ["output"],
    "run_name": ["name"],
}
"""Keys that words of other trainers mean; ``pairs_per_backward`` pairs at a time are accumulated to a batch."""

MOST_CHARACTERS, MOST_VALUES, DEEPEST = 2**18, 100_000, 50
TOO_MUCH = f"no configuration has more than {MOST_CHARACTERS} characters, {MOST_VALUES} values or {DEEPEST} levels"
MOST_PROBLEMS, LONGEST_VALUE = 20, 200
"""Problems that an error lists, and characters of a value in it."""
LARGEST_BITS = 1024
"""Bits of the largest numbers that a float can hold."""


def _parsed(text: str, kind: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        ValueError: it is so long or nested so deeply that reading it would take long, or makes the reader stumble.
        YAMLError: it is no YAML.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(TOO_MUCH)
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):  # also in quotes, where they mostly come in pairs
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        if depth > 4 * DEEPEST:
            raise ValueError(TOO_MUCH)
    try:
        return YAML(typ=kind).load(text)
    except RecursionError as error:
        raise ValueError(TOO_MUCH) from error
    except YAMLError:
        raise
    except Exception as error:  # whatever the reader stumbles over, such as a merge key that names its own mapping
        raise ValueError(first_line(error)) from error


def _plain(node: Any, path: str, counter: "count[int]", depth: int = 0) -> Any:
    """Return a tree without aliases, of which a short file can have billions of values.

    Raises:
        UserError: it is too large.
    """
    if next(counter) > MOST_VALUES or depth > DEEPEST:
        raise UserError(f"{path}: {TOO_MUCH}")
    inner = partial(_plain, path=path, counter=counter, depth=depth + 1)
    if isinstance(node, dict):
        return {str(key): inner(value) for key, value in node.items()}
    if isinstance(node, list):
        return [inner(value) for value in node]
    large = isinstance(node, int) and node.bit_length() > LARGEST_BITS  # Python refuses to write it in an error
    return math.inf if large else node


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} must look like key.sub=value")
    try:
        set_key(tree, key, _parsed(text, "safe"))
    except YAMLError as error:
        raise UserError(f"override {override!r}: the value is no YAML: {error}") from error
    except ValueError as error:
        raise UserError(f"override {override[:200]!r}: {error}") from error


def _given(key: Sequence[int | str], overrides: Sequence[str]) -> bool:
    """Return True if an override sets this key, or a section around it."""
    name = ".".join(map(str, key))
    return any(f"{name}.".startswith(f"{override.partition('=')[0]}.") for override in overrides)


def _explain(error: ValidationError, tree: CommentedMap, path: str, overrides: Sequence[str]) -> str:
    lines, problems = [], error.errors()
    for item in problems[:MOST_PROBLEMS]:
        where = [part for part in item["loc"] if part != "[key]"]
        key = _drop_tags(where, tree)
        line = _line(tree, key)
        place = "command line" if _given(key, overrides) else f"{path}{f':{line}' if line else ''}"
        text = f"{place}: " + (f"{'.'.join(map(str, key))}: " if key else "")
        if item["type"] == "extra_forbidden":
            text += f"unknown key; {_meant(key, _fields(key[:-1], tree))}"
        else:
            given = "" if isinstance(item["input"], dict) else f" (given: {_shortened(repr(item['input']))})"
            text += item["msg"] + given + _nearest_value(item)
        lines.append(text)
    more = len(problems) - len(lines)
    return "\n".join(lines + ([f"and {more} more"] if more else []))


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _meant(key: Sequence[int | str], known: Sequence[str]) -> str:
    """Return a hint at the key that is meant by an unknown one, whose section has the keys ``known``."""
    *section, name = map(str, key)
    elsewhere = ELSEWHERE.get(name) or [key for key in _scalar_keys(Config) if key.rpartition(".")[2] == name]
    inside = [other for other in elsewhere if other.startswith(".".join([*section, ""]))]
    if elsewhere:
        return f"did you mean {' or '.join(inside or elsewhere)}?"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"


def _scalar_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a section's fields, without those within mappings, lists and choices of sections."""
    for name, field in section.model_fields.items():
        inner = _leaf_sections(field.annotation)
        if len(inner) == 1 and get_origin(field.annotation) not in (dict, list):
            yield from _scalar_keys(inner[0], f"{prefix}{name}.")
        elif not inner:
            yield f"{prefix}{name}"


def _nearest_value(item: Any) -> str:
    """Return a hint at the nearest allowed word, or nothing."""
    allowed = re.findall(
        "'([^']+)'", str(item.get("ctx", {}).get("expected", item.get("ctx", {}).get("expected_tags")))
    )
    given = item["input"].get("type") if isinstance(item["input"], dict) else item["input"]
    near = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _drop_tags(where: Sequence[int | str], tree: Any) -> list[int | str]:
    """Return an error's location without the tags that Pydantic adds for unions: parts in the file, and the last."""
    kept: list[int | str] = []
    node = tree
    for index, part in enumerate(where):
        inside = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
        if inside:
            node = node[part]
        elif index < len(where) - 1:
            continue
        kept.append(part)
    return kept


def _line(tree: Any, key: Sequence[int | str]) -> int | None:
    """Return the line (from 1) of the deepest part of ``key`` that is in the file, or None."""
    line, node = None, tree
    for part in key:
        position = getattr(node, "lc", None)
        if position is None or not isinstance(node, dict) or part not in node:
            break
        found = (position.data or {}).get(part)
        line = found[0] + 1 if found else line
        node = node[part]
    return line


def _fields(key: Sequence[int | str], tree: Any) -> list[str]:
    """Return the valid field names of the section at ``key``."""
    annotation: Any = Config
    node = tree
    for part in key:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            annotation = _section(annotation, node).model_fields[str(part)].annotation
        node = node[part]
    return list(_section(annotation, node).model_fields)


def _section(annotation: Any, node: Any) -> Any:
    """Return the section's class that an annotation has for this node of the file."""
    candidates = _leaf_sections(annotation)
    if len(candidates) == 1:  # also of a section that may be null
        return candidates[0]
    tagged = [c for c in candidates if node.get("type") in getattr(c.model_fields["type"].annotation, "__args__", ())]
    return (tagged or candidates)[0]


def _leaf_sections(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [leaf for argument in getattr(annotation, "__args__", ()) for leaf in _leaf_sections(argument)]
