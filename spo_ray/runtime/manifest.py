"""Manifests: what a finished stage was made from and which files it has, and why it is made again."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError

from spo_ray.config.base import first_problem
from spo_ray.config.keys import leaves
from spo_ray.errors import UserError

T = TypeVar("T", bound=BaseModel)
MANIFEST = "manifest.json"
SHOWN = 4
"""Number of differences that are listed."""
NOTHING = "not there"


class UnreadableError(UserError):
    """A file of a run can't be read; the message names it and says why."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Identified(_Part):
    """A file that holds the digest of a stage."""

    digest: str


class _Rows(_Part):
    read: NonNegativeInt
    kept: NonNegativeInt
    dropped: dict[str, NonNegativeInt]


class _File(_Part):
    bytes: NonNegativeInt
    sha256: str
    rows: NonNegativeInt | None = None


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("leads out of the stage's folder")
    return name


class _Manifest(Identified):
    stage: str
    version: str
    seed: int
    config: dict[str, Any]
    inputs: dict[str, str]
    rows: _Rows
    facts: dict[str, Any]
    versions: dict[str, str]
    wall_s: NonNegativeFloat
    files: dict[Annotated[str, AfterValidator(_inside)], _File]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a stage's folder; None if there is none.

    Raises:
        UnreadableError: it is no manifest, or can't be read.
    """
    read = read_model(folder / MANIFEST, _Manifest)
    return None if read is None else read.model_dump()


def read_model(file: Path, kind: type[T]) -> T | None:
    """Return the content of a JSON file; None if there is no such file.

    Raises:
        UnreadableError: it has another form, or can't be read.
    """
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):  # a pipe or a device can be read for ever
            raise UnreadableError(f"{file.parent.name}/{file.name} can't be read (it is no file)")
        return kind.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        why = error.strerror or type(error).__name__
    except ValidationError as error:
        why = first_problem(error)
    raise UnreadableError(f"{file.parent.name}/{file.name} can't be read ({why})")


def manifests(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (folder, manifest) of the stages directly in a run's folder, by the time of their end.

    What is no manifest, or can't be read, is left out.
    """
    found = []
    for file in root.glob(f"*/{MANIFEST}"):
        try:
            found.append((file.stat().st_mtime, file.parent, read_manifest(file.parent)))
        except (OSError, UnreadableError):
            continue
    yield from ((folder, manifest) for _, folder, manifest in sorted(found, key=lambda one: one[:2]) if manifest)


def why_again(manifest: Mapping[str, Any], identity: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the differences between a stage's manifest and its present identity as one line.

    ``names`` are the names of this run's stages by digest.
    """
    now, heads = json.loads(json.dumps(identity, default=str)), {"version": "spo_ray", "seed": "seed"}
    found = [f"{head} {manifest.get(k)} -> {now[k]}" for k, head in heads.items() if manifest.get(k) != now[k]]
    before, after = (dict(leaves(side.get("config", {}))) for side in (manifest, now))
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, NOTHING), after.get(key, NOTHING)
        found += [f"{key} {shown(old)} -> {shown(new)}"] if old != new else []
    inputs = manifest.get("inputs", {})
    found += [f"input changed: {names.get(d, key)}" for key, d in now["inputs"].items() if inputs.get(key) != d]
    found += [f"input removed: {key}" for key in inputs if key not in now["inputs"]]
    return some_of(found)


def some_of(found: list[str]) -> str:
    """Return the first differences as one line, and the number of the others."""
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def shown(value: Any) -> str:
    """Return a value as text of at most 40 characters."""
    text = value if value is NOTHING else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
