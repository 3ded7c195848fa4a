"""Dotted keys of the configuration, such as ``methods.spo.base.beta``."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from spo_ray.config.base import ConfigModel

C = TypeVar("C", bound=ConfigModel)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return the values of nested mappings with their dotted keys; an empty mapping counts as a value."""
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else key)


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key of nested mappings, and make the mappings on the way that are missing.

    Raises:
        ValueError: a part of the key has a value that is no mapping.
    """
    *parents, last = key.split(".")
    for part in parents:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise ValueError(f"{part} holds a value, not a section")
    tree[last] = value


def with_values(config: C, values: Mapping[str, Any]) -> C:
    """Return a configuration with other values at some dotted keys.

    Fields that were never set take the defaults of the new values: another ``base.type`` brings its own beta.

    Raises:
        pydantic.ValidationError: a value is not valid there.
    """
    tree = config.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        set_key(tree, key, value)
    return type(config).model_validate(tree)
