"""Base class and shared field types of the configuration."""

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError


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


def first_problem(error: ValidationError) -> str:
    """Return the first problem of data that was read, with its place, as one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ": ".join([*(str(part) for part in first["loc"]), first["msg"]])
