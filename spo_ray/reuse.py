"""Why a finished stage can't be reused: how what it depends on differs from what its manifest says."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

SHOWN = 4
"""Differences that are named; of more only the number."""
NOTHING = "not there"


def why_again(manifest: Mapping[str, Any], identity: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """One line for people: the differences between a stage's manifest and its identity now.

    ``names`` has the stages of this run by their digests.
    """
    found = list(_differences(manifest, json.loads(json.dumps(identity, default=str)), names))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    for key, what in (("version", "spo_ray"), ("seed", "seed")):
        if old.get(key) != new[key]:
            yield f"{what} {old.get(key)} -> {new[key]}"
    before, now = (dict(leaves(side.get("config", {}))) for side in (old, new))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key, NOTHING) != now.get(key, NOTHING):
            yield f"{key} {shown(before.get(key, NOTHING))} -> {shown(now.get(key, NOTHING))}"
    inputs = old.get("inputs", {})
    for key, digest in new["inputs"].items():
        if inputs.get(key) != digest:
            yield f"its input {names.get(digest, key)} is another"
    yield from (f"without its input {key}" for key in inputs if key not in new["inputs"])


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested mappings by their dotted keys."""
    if not isinstance(tree, dict) or not tree:
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else key)


def shown(value: Any) -> str:
    """A value for people."""
    text = value if value is NOTHING else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
