"""Base class and shared field types of the configuration."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

LARGEST = 10**12
"""Largest absolute value of a number."""


class ConfigModel(BaseModel):
    """Base class of all sections of the configuration: frozen, unknown keys are errors, and numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _numbers_in_range(cls, value: Any) -> Any:
        for number in _numbers(value):
            if not abs(number) <= LARGEST:  # also for NaN
                raise ValueError(f"numbers must be finite and at most {LARGEST:.0e}")
        return value


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield the numbers in a value, also those in lists and mappings; sections check their own."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


SECRET = re.compile(
    r"(token|key|secret|password|passwd|credential)s?$"
    r"|(^|_)(token|key|secret|pass|password|passwd|credential)s?(_(?!file$|path$|dir$)|$)",
    re.IGNORECASE,
)
"""Pattern of the names of environment variables whose value is a secret."""


def is_secret(name: str) -> bool:
    """Return True if an environment variable of this name holds a secret."""
    return SECRET.search(name) is not None


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of random numbers; Optuna and lm-eval take no others."""
Seconds = Annotated[float, Field(gt=0.0, le=1e7)]
"""A time limit; larger numbers overflow in the libraries that count nanoseconds."""


def first_problem(error: ValidationError) -> str:
    """Return the first problem of data that was read, with its place, as one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ": ".join([*(str(part) for part in first["loc"]), first["msg"]])


class RowSource(ConfigModel):
    """Rows to train on, from files or from the Hugging Face hub."""

    path: Path
    """Folder with ``SPLIT.jsonl``, JSON or Parquet files, one such file, or the name of a dataset on the hub."""
    subset: str | None = None
    """Configuration of a hub dataset, such as GSM8K's ``main``."""
    revision: str = "main"
    """Branch, tag or commit of a hub dataset. Only a commit makes a result repeatable."""
    train_split: str = "train"
    """Split to train on."""
