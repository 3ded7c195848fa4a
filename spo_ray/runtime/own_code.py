"""Classes and functions of the user's own, named in the configuration as ``package.module:name``."""

import hashlib
import importlib
import inspect
from typing import Any

from spo_ray.errors import UserError


def load_own(name: str, setting: str) -> Any:
    """Import what ``package.module:name`` names; ``setting`` begins the error's message.

    Raises:
        UserError: there is no such module, or nothing of that name in it.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{setting} ({error}); the module must be importable on every node (PYTHONPATH)") from error


def source_digest(value: Any) -> str:
    """Return a digest of the module that a class or function is from: changed code can change results."""
    module = inspect.getmodule(value)
    return hashlib.sha256((inspect.getsource(module) if module else "").encode()).hexdigest()[:16]
