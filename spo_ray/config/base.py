"""Base class and shared field types of the configuration."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class ConfigModel(BaseModel):
    """Frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


SECRET = re.compile(
    r"(token|key|secret|password|passwd|credential)s?$"
    r"|(^|_)(token|key|secret|pass|password|passwd|credential)s?(_(?!file$|path$|dir$)|$)",
    re.IGNORECASE,
)
"""Names of environment variables whose value is a secret."""


def is_secret(name: str) -> bool:
    """Whether an environment variable of that name holds a secret."""
    return SECRET.search(name) is not None


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
