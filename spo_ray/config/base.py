"""Base class and shared field types of the configuration."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class ConfigModel(BaseModel):
    """Base class of all sections of the configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


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
Dtype = Literal["float32", "bfloat16"]


class RowSource(ConfigModel):
    """Rows from files or from the Hugging Face hub."""

    path: Path
    """Folder with ``SPLIT.jsonl`` or Parquet files, one such file, or the name of a dataset on the hub."""
    subset: str | None = None
    """Configuration of a hub dataset, such as GSM8K's ``main``."""
    revision: str = "main"
    """Branch, tag or commit of a hub dataset. Only a commit makes a result repeatable."""
    train_split: str = "train"
    """Split to train on."""
