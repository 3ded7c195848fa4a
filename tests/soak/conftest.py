"""The pairs of the training tests."""

from ..train.conftest import pairs, referenced

__all__ = ["pairs", "referenced"]
